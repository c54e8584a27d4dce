package router

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// counted counts the connections that come in.
type counted struct {
	net.Listener
	connections atomic.Int64
}

func (c *counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.connections.Add(1)
	}
	return conn, err
}

// A certificate is looked at in the handshake. So there must be one now and then,
// and no call may suffer from that.
func TestConnectionsAreMadeAnewAndNoCallIsLost(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &counted{Listener: l}
	server := grpc.NewServer(serverOptions(20 * time.Millisecond)...)
	csi.RegisterControllerServer(server, csi.UnimplementedControllerServer{})
	go func() { _ = server.Serve(c) }() // until it is stopped
	defer server.Stop()
	s := New(Static{{Segment: "node-1", Address: l.Addr().String()}}, func(string) credentials.TransportCredentials { return insecure.NewCredentials() }, unsigned)
	defer s.Close()
	for deadline := time.Now().Add(time.Minute); c.connections.Load() < 5; {
		if _, err := s.GetCapacity(t.Context(), &csi.GetCapacityRequest{}); err == nil || !is(err, codes.Unimplemented) { // it was there
			t.Fatalf("after %d connections: %v", c.connections.Load(), err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("there were %d connections", c.connections.Load())
		}
	}
}
