package driver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/transfer"
	"github.com/orlop-csi/orlop/tests/harness"
)

// counted counts the writes to a connection.
type counted struct {
	net.Conn

	writes atomic.Int64
}

func (c *counted) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// accepted gives one end of a connection over loopback, and has the other used.
func accepted(t *testing.T, use func(address string)) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go use(l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func credentialsOf(t *testing.T, a *harness.Authority, identity *url.URL) *peer.Credentials {
	t.Helper()
	dir := t.TempDir()
	a.Issue(dir, identity, time.Now().Add(time.Hour))
	own, err := peer.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return own
}

// On the one port there are connections for calls, which gRPC gets, and
// connections for bytes, which it does not.
func TestConnectionsForBytesAreToldFromThoseForCalls(t *testing.T) {
	a := harness.NewAuthority(t)
	server, client := credentialsOf(t, a, peer.Node("node-1")), credentialsOf(t, a, peer.Node("node-2"))
	handshake := func(open func(address string) (net.Conn, error)) (net.Conn, net.Conn, error) {
		t.Helper()
		opened := make(chan net.Conn, 1)
		c := accepted(t, func(address string) {
			c, err := open(address)
			if err != nil {
				t.Error(err)
			}
			opened <- c
		})
		far, _, err := withBytes{credentials.NewTLS(serverTLS(server)), transfer.NewConnections()}.Clone().ServerHandshake(c)
		near := <-opened
		t.Cleanup(func() { _ = near.Close() })
		return near, far, err
	}

	near, far, err := handshake(func(address string) (net.Conn, error) {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return nil, err
		}
		secured, _, err := credentials.NewTLS(client.Client("node-1")).ClientHandshake(t.Context(), "node-1", c)
		return secured, err
	})
	if err != nil || far == nil {
		t.Fatalf("a connection for calls: %v", err)
	}
	go func() { _, _ = far.Write([]byte("!")) }()
	if _, err := near.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}

	near, far, err = handshake(func(address string) (net.Conn, error) {
		c, err := openForBytes(context.Background(), client, "node-1", address)
		if err == nil {
			_, err = c.Write(make([]byte, 16)) // its name
		}
		return c, err
	})
	if !errors.Is(err, credentials.ErrConnDispatched) || far != nil {
		t.Fatalf("a connection for bytes: %v", err)
	}
	_ = near.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection for bytes is not left open: %v", err)
	}
}

// What is written at once to a secured connection goes to the network at once,
// complete, in order, and as soon as the write returns; what the handshake itself
// says does not wait for anything.
func TestOneWriteIsOneWriteToTheNetwork(t *testing.T) {
	a := harness.NewAuthority(t)
	server, client := credentialsOf(t, a, peer.Node("node-1")), credentialsOf(t, a, peer.Node("node-2"))
	opened := make(chan net.Conn, 1)
	network := &counted{Conn: accepted(t, func(address string) {
		c, err := openForBytes(context.Background(), client, "node-1", address)
		if err != nil {
			t.Error(err)
		}
		opened <- c
	})}
	records := &corked{Conn: network}
	secured := tls.Server(records, serverTLS(server))
	if err := secured.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	far := &corkedConn{secured, records}
	defer far.Close()
	reader := <-opened
	defer reader.Close()

	for _, size := range []int{1, 100, 16 << 10, 512 << 10, 1<<20 + 3} {
		data, got := make([]byte, size), make([]byte, size)
		_, _ = rand.Read(data)
		before := network.writes.Load()
		sent := make(chan error, 1)
		go func() {
			_, err := far.Write(data)
			sent <- err
		}()
		if _, err := io.ReadFull(reader, got); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes: %v, equal %t", size, err, bytes.Equal(got, data))
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if n := network.writes.Load() - before; n != 1 {
			t.Errorf("%d bytes went to the network in %d writes", size, n)
		}
	}

	// An answer the other way, and the end.
	if _, err := reader.Write([]byte("thanks")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(far, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	reader.Close()
	if _, err := io.Copy(io.Discard, far); err != nil {
		t.Errorf("after the other end has closed: %v", err)
	}
	network.Close()
	if _, err := far.Write(make([]byte, 100)); err == nil {
		t.Error("a write to a closed connection succeeds")
	}
}
