package driver

import (
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// batched makes a TLS connection that is written to give the network all the
// records of one write at once. Package tls gives it each by itself, 16 KiB, and
// on the way of a copy between two nodes each costs a system call and the host's
// packet filter as much as 64 KiB would.
type batched struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (b batched) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	records := &corked{Conn: c}
	secured, info, err := b.TransportCredentials.ServerHandshake(records)
	if err != nil {
		return nil, nil, err
	}
	return &batchedConn{secured, records}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (b batched) Clone() credentials.TransportCredentials {
	return batched{b.TransportCredentials.Clone()}
}

// batchedConn is the TLS connection over a corked one.
type batchedConn struct {
	net.Conn

	records *corked
}

// Write implements net.Conn.
func (c *batchedConn) Write(b []byte) (int, error) {
	c.records.cork()
	n, err := c.Conn.Write(b)
	if failed := c.records.uncork(); err == nil && failed != nil {
		return 0, failed
	}
	return n, err
}

// corked is a connection that keeps what is written to it, in order, while it is
// corked.
type corked struct {
	net.Conn

	mu   sync.Mutex
	on   bool
	kept []byte
}

// Write implements net.Conn.
func (c *corked) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.on {
		return c.Conn.Write(b)
	}
	c.kept = append(c.kept, b...)
	return len(b), nil
}

func (c *corked) cork() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = true
}

func (c *corked) uncork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = false
	_, err := c.Conn.Write(c.kept)
	c.kept = c.kept[:0]
	return err
}
