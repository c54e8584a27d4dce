package harness

import (
	"context"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/request"
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
	return StartFleetOf(t, Binary(t), configs...)
}

// StartFleetOf is StartFleet with another csi-driver.
func StartFleetOf(t testing.TB, binary string, configs ...string) *Fleet {
	t.Helper()
	f := &Fleet{Authority: NewAuthority(t)}
	for i, config := range configs {
		n := New(t, config)
		n.Binary = binary
		n.Node = fmt.Sprintf("node-%d", i+1)
		f.addresses = append(f.addresses, servePeer(n, f.Authority))
		n.Start()
		f.Nodes = append(f.Nodes, n)
	}
	f.Driver = New(t, "")
	f.Binary, f.Mode = binary, "controller"
	f.Authority.Issue(filepath.Join(f.Dir, "tls"), peer.Controller(), time.Now().Add(lifetime))
	f.Route(f.Nodes...)
	return f
}

// Route starts the router, anew if need be, for these nodes only.
func (f *Fleet) Route(nodes ...*Driver) {
	f.t.Helper()
	f.Stop()
	f.base = []string{"--tls-dir", filepath.Join(f.Dir, "tls")}
	for i, n := range f.Nodes {
		for _, wanted := range nodes {
			if n == wanted {
				f.base = append(f.base, "--node", n.Node+"="+f.addresses[i])
			}
		}
	}
	f.Start()
}

// Via has the router reach a node at another address, from its next [Fleet.Route]
// on.
func (f *Fleet) Via(node int, address string) { f.addresses[node] = address }

// servePeer has a driver serve a router too, and gives the address.
func servePeer(d *Driver, a *Authority) (address string) {
	d.t.Helper()
	d.Mode = "node"
	tls, address := filepath.Join(d.Dir, "tls"), freeAddress(d.t)
	a.Issue(tls, peer.Node(d.Node), time.Now().Add(lifetime))
	d.base = []string{"--tls-dir", tls, "--peer-address", address}
	return address
}

// backdrop is what is behind a router beside the driver that a test starts: two
// nodes without room, so that what the test makes is made on its own, while
// every list, sum and search goes over all three.
type backdrop struct {
	authority *Authority
	nodes     []string // as --node has them
}

// backdrops is those of the tests that are behind routers, by the tests' names.
var backdrops sync.Map

// BehindRouter has every driver that the test and its subtests start from now on
// be one of three nodes behind a router: its Controller client calls the router,
// its other clients the node itself.
func BehindRouter(t testing.TB) {
	t.Helper()
	b := &backdrop{authority: NewAuthority(t)}
	for _, name := range []string{"spare-1", "spare-2"} {
		d := prepare(t, "pools:\n- name: default\n  source: {directory: $DIR/pool}\n  reserve: 4Ei\n")
		if err := os.Mkdir(filepath.Join(d.Dir, "pool"), 0o700); err != nil {
			t.Fatal(err)
		}
		d.Node = name
		b.nodes = append(b.nodes, name+"="+servePeer(d, b.authority))
		d.Start()
	}
	backdrops.Store(t.Name(), b)
	t.Cleanup(func() { backdrops.Delete(t.Name()) })
}

// fleetOf finds the backdrop of a test; nil if it has none.
func fleetOf(t testing.TB) *backdrop {
	for name := t.Name(); name != "."; name = path.Dir(name) {
		if b, ok := backdrops.Load(name); ok {
			return b.(*backdrop)
		}
	}
	return nil
}

// take puts a router in front of a driver and the backdrop.
func (b *backdrop) take(d *Driver) {
	d.t.Helper()
	d.router = prepare(d.t, "")
	d.router.Mode = "controller"
	tls := filepath.Join(d.router.Dir, "tls")
	b.authority.Issue(tls, peer.Controller(), time.Now().Add(lifetime))
	d.router.base = []string{"--tls-dir", tls, "--node", d.Node + "=" + servePeer(d, b.authority)}
	for _, n := range b.nodes {
		d.router.base = append(d.router.base, "--node", n)
	}
}

// reached waits until the router in front of a driver, if there is one, reaches
// it: it may have waited for a while before it tries again.
func (d *Driver) reached() error {
	if d.router == nil {
		return nil
	}
	deadline := time.Now().Add(time.Minute)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := d.router.GetCapacity(ctx, &csi.GetCapacityRequest{
			AccessibleTopology: &csi.Topology{Segments: map[string]string{request.TopologyKey: d.Node}},
		})
		cancel()
		if status.Code(err) != codes.Unavailable {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the router does not reach %s: %w\n%s", d.Node, err, d.router.Log())
		}
		time.Sleep(5 * time.Millisecond)
	}
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
