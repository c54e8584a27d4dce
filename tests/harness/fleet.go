package harness

import (
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/peer"
)

// Fleet is a router and the nodes behind it, each a process of its own, with
// certificates of one authority. As a Driver it is the router.
type Fleet struct {
	*Driver
	Nodes     []*Driver
	Authority *Authority
	addresses []string
}

// StartFleet starts a node for each configuration, called node-1, node-2 and so
// on, and a router for them all.
func StartFleet(t testing.TB, configs ...string) *Fleet {
	t.Helper()
	f := &Fleet{Authority: NewAuthority(t)}
	for i, config := range configs {
		n := New(t, config)
		n.Mode, n.Node = "node", fmt.Sprintf("node-%d", i+1)
		tls, address := filepath.Join(n.Dir, "tls"), freeAddress(t)
		f.Authority.Issue(tls, peer.Node(n.Node), time.Now().Add(time.Hour))
		n.Args = []string{"--tls-dir", tls, "--peer-address", address}
		n.Start()
		f.Nodes = append(f.Nodes, n)
		f.addresses = append(f.addresses, address)
	}
	f.Driver = New(t, "")
	f.Mode = "controller"
	f.Authority.Issue(filepath.Join(f.Dir, "tls"), peer.Controller(), time.Now().Add(time.Hour))
	f.Route(f.Nodes...)
	return f
}

// Route starts the router, anew if need be, for these nodes only.
func (f *Fleet) Route(nodes ...*Driver) {
	f.t.Helper()
	f.Stop()
	f.Args = []string{"--tls-dir", filepath.Join(f.Dir, "tls")}
	for i, n := range f.Nodes {
		for _, wanted := range nodes {
			if n == wanted {
				f.Args = append(f.Args, "--node", n.Node+"="+f.addresses[i])
			}
		}
	}
	f.Start()
}

// freeAddress finds a port that nobody listens at.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Address is where a node serves the router.
func (f *Fleet) Address(node int) string { return f.addresses[node] }
