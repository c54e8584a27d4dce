//go:build integration

package chaos

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/orlop-csi/orlop/tests/harness"
)

// nodesOfFleet is how many nodes there are behind the router.
const nodesOfFleet = 3

// copyAbandoned is how long a copy to another node, and the snapshot that it is
// made from, outlives the last call that asked for it.
const copyAbandoned = 4 * time.Second

// fleet is three machines behind a router, which an orchestrator calls. Whatever
// goes from the router to a node, or from one node to another, goes over the link
// of that node.
type fleet struct {
	f        *harness.Fleet
	machines []*machine
	links    []*link
	router   clients
}

func startFleet(t *testing.T) *fleet {
	t.Helper()
	var configs []string
	for range nodesOfFleet {
		configs = append(configs, harness.FilePool(poolSize))
	}
	f := &fleet{f: harness.StartFleet(t, configs...)}
	for i, n := range f.f.Nodes {
		n.Args = append(n.Args, "--copy-abandon-after", copyAbandoned.String())
		n.Restart()
		f.machines = append(f.machines, newMachine(t, n))
		f.links = append(f.links, newLink(t, f.f.Address(i)))
		f.f.Via(i, f.links[i].l.Addr().String())
	}
	f.f.Route(f.f.Nodes...)
	conn := reach(t, f.f.Socket)
	f.router = clients{csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn)}
	return f
}

func (f *fleet) client() clients   { return f.router }
func (f *fleet) nodes() []*machine { return f.machines }
func (f *fleet) quiet() bool       { return false }

func (f *fleet) strikes() []string {
	return []string{"kill", "kill", "stop", "kill router", "kill router", "break link", "break link", "silence link"}
}

func (f *fleet) strike(s strike) func() {
	m, k := f.machines[s.Node], f.links[s.Node]
	switch s.What {
	case "kill":
		m.Kill()
	case "stop":
		m.Stop()
	case "kill router":
		f.f.Kill()
		return func() {
			f.f.Start()
			f.reached()
		}
	case "break link":
		k.set(broken)
		return func() { k.set(whole) }
	case "silence link":
		k.set(silent)
		return func() { k.set(whole) }
	default:
		panic(fmt.Sprintf("nobody knows how to %s", s.What))
	}
	return func() {
		m.Start()
		m.reached()
	}
}

// reached waits until the clients reach a router that was started again.
func (f *fleet) reached() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, _ = f.router.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{}, grpc.WaitForReady(true))
}

func TestFleet(t *testing.T) {
	f := startFleet(t)
	var names []string
	for _, m := range f.machines {
		names = append(names, m.Node)
	}
	r := newRun(t, f, seed(t), poolRoom, names)
	r.goOn(fewOfFleet)
}
