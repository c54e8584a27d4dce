package driver

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

// withBytes are the credentials of the port for peers, on which there are
// connections for calls and, by another protocol, connections for bytes
// (transfer.Protocol): these it takes away from gRPC.
type withBytes struct {
	credentials.TransportCredentials

	connections *transfer.Connections
}

// ServerHandshake implements credentials.TransportCredentials.
func (w withBytes) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	records := &corked{Conn: c}
	secured, info, err := w.TransportCredentials.ServerHandshake(records)
	if err != nil {
		return nil, nil, err
	}
	s, ok := info.(credentials.TLSInfo)
	if !ok || s.State.NegotiatedProtocol != transfer.Protocol {
		return secured, info, nil
	}
	opener, err := peer.Caller(s.State)
	if err == nil {
		err = w.connections.Add(opener, &corkedConn{secured, records})
	}
	if err != nil {
		return nil, nil, err
	}
	return nil, nil, credentials.ErrConnDispatched
}

// Clone implements credentials.TransportCredentials.
func (w withBytes) Clone() credentials.TransportCredentials {
	return withBytes{w.TransportCredentials.Clone(), w.connections}
}

// serverTLS is the configuration of a port with both protocols. gRPC adds its own.
func serverTLS(own *peer.Credentials) *tls.Config {
	c := own.Server()
	c.NextProtos = []string{transfer.Protocol}
	return c
}

// openForBytes opens a connection for bytes to a node.
func openForBytes(ctx context.Context, own *peer.Credentials, segment, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshake)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	config := own.Client(segment)
	config.NextProtos = []string{transfer.Protocol}
	secured := tls.Client(&readAhead{c, bufio.NewReaderSize(c, readAheadSize)}, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return secured, nil
}

// readAheadSize is how much is read from the network at once, in bytes.
const readAheadSize = 128 << 10

// readAhead is a connection that is read in larger parts than the records, 16 KiB,
// that package tls asks for one by one.
type readAhead struct {
	net.Conn

	from *bufio.Reader
}

// Read implements net.Conn.
func (r *readAhead) Read(b []byte) (int, error) { return r.from.Read(b) }

// corkedConn is a TLS connection that gives the network all the records of one
// write at once. Package tls gives it each by itself, 16 KiB, and on the way of a
// copy between two nodes each costs a system call and the host's packet filter as
// much as 64 KiB would.
type corkedConn struct {
	net.Conn

	records *corked
}

// Write implements net.Conn.
func (c *corkedConn) Write(b []byte) (int, error) {
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
