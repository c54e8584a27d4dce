// Package router serves the CSI Controller service for a fleet of nodes, each
// of which is a whole CSI driver for its own disks: it picks the node that a
// call concerns, from the volume's ID or from where the volume may be, and
// forwards the same call there.
//
// It keeps nothing: any number of routers can serve the same nodes at once. It
// touches no disk.
package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// reconnect is how soon a node that comes back is found: the library's own limit
// is two minutes, through which every call to the node would fail.
var reconnect = grpc.WithConnectParams(grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
	MinConnectTimeout: 5 * time.Second,
})

// Node is one node of the fleet.
type Node struct {
	Segment string // of the topology and of IDs; see pool.NodeSegment
	Address string // host:port at which its driver serves peers; empty while it does not
}

// Discovery tells which nodes there are. A node that is down is still one: calls
// to it fail, and are repeated later. One that is not there any more is gone for
// good, and its volumes with it.
type Discovery interface {
	// Nodes lists the nodes; the slice is the caller's.
	Nodes(ctx context.Context) ([]Node, error)
}

// Static is a fleet that never changes.
type Static []Node

// Nodes implements [Discovery].
func (s Static) Nodes(context.Context) ([]Node, error) { return slices.Clone(s), nil }

// fleet is the nodes and the connections to them.
type fleet struct {
	discovery   Discovery
	credentials func(segment string) credentials.TransportCredentials

	mu          sync.Mutex
	connections map[Node]*grpc.ClientConn
}

// member is a node that can be called. A connection is made when it is needed,
// and again when it broke.
type member struct {
	Node
	csi.ControllerClient
}

// absent is in the place of a connection to a node whose driver does not run.
type absent struct{}

func (absent) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.Unavailable, "its driver does not run at present")
}

func (a absent) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, a.Invoke(ctx, method, nil, nil)
}

// list gives all nodes, ordered by segment.
func (f *fleet) list(ctx context.Context) ([]member, error) {
	nodes, err := f.discovery.Nodes(ctx)
	if err != nil {
		return nil, pool.Errorf(pool.ErrUnavailable, "finding the nodes: %w", err)
	}
	slices.SortFunc(nodes, func(a, b Node) int { return cmp.Compare(a.Segment, b.Segment) })
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget(nodes)
	members := make([]member, 0, len(nodes))
	for _, n := range nodes {
		if n.Address == "" {
			members = append(members, member{n, csi.NewControllerClient(absent{})})
			continue
		}
		connection, ok := f.connections[n]
		if !ok {
			if connection, err = grpc.NewClient(n.Address, grpc.WithTransportCredentials(f.credentials(n.Segment)), reconnect); err != nil {
				return nil, fmt.Errorf("node %s at %s: %w", n.Segment, n.Address, err)
			}
			f.connections[n] = connection
		}
		members = append(members, member{n, csi.NewControllerClient(connection)})
	}
	return members, nil
}

// forget closes the connections to nodes that are gone or have moved. It is
// called with the lock held.
func (f *fleet) forget(nodes []Node) {
	for n, connection := range f.connections {
		if !slices.Contains(nodes, n) {
			_ = connection.Close() // its calls in flight fail, as they would anyway
			delete(f.connections, n)
		}
	}
}

func (f *fleet) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for n, connection := range f.connections {
		errs = append(errs, connection.Close())
		delete(f.connections, n)
	}
	return errors.Join(errs...)
}

// answer is what one node said.
type answer[T any] struct {
	member
	value T
	err   error
}

// ask calls all nodes at once and gives their answers in the order of the
// nodes.
func ask[T any](ctx context.Context, members []member, call func(context.Context, member) (T, error)) []answer[T] {
	answers := make([]answer[T], len(members))
	var calls sync.WaitGroup
	for i, m := range members {
		calls.Go(func() {
			value, err := call(ctx, m)
			answers[i] = answer[T]{m, value, at(m, err)}
		})
	}
	calls.Wait()
	return answers
}
