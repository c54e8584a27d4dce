package driver

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"io"
	"net"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/credentials"
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

// What is written at once to a secured connection goes to the network at once,
// complete, in order, and as soon as the write returns; what the handshake itself
// says does not wait for anything.
func TestOneWriteIsOneWriteToTheNetwork(t *testing.T) {
	authority := httptest.NewUnstartedServer(nil)
	authority.StartTLS()
	defer authority.Close()
	server := batched{credentials.NewTLS(&tls.Config{Certificates: authority.TLS.Certificates, MinVersion: tls.VersionTLS13})}.Clone()
	client := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}) // who it is, is not the question

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near := make(chan net.Conn, 1)
	go func() {
		c, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Error(err)
		} else if c, _, err = client.ClientHandshake(t.Context(), "server", c); err != nil {
			t.Error(err)
		}
		near <- c
	}()
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	network := &counted{Conn: accepted}
	far, info, err := server.ServerHandshake(network)
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if _, ok := info.(credentials.TLSInfo); !ok {
		t.Errorf("the connection's state is %T", info)
	}
	reader := <-near
	if reader == nil {
		t.FailNow()
	}
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
	accepted.Close()
	if _, err := far.Write(make([]byte, 100)); err == nil {
		t.Error("a write to a closed connection succeeds")
	}
}
