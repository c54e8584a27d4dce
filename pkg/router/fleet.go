// Package router serves the CSI Controller service for a fleet of nodes, each
// of which is a whole CSI driver for its own disks: it picks the node that a
// call concerns, from the volume's ID or from where the volume may be, and
// forwards the same call there.
//
// It keeps nothing that it could not find again: any number of routers can
// serve the same nodes at once. It touches no disk.
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
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// The bounds of what is asked of nodes.
const (
	// patience is how long a node may take over a question: whether it has
	// something, what it has, how much room there is. Nodes answer those
	// from memory. What makes or removes something takes as long as the
	// caller waits.
	patience = 10 * time.Second
	// atOnce is how many nodes are asked at the same time.
	atOnce = 64
	// batch is how many entries of a list a node is asked for at once, so that
	// an answer stays far below maxMessage.
	batch = 1000
	// maxMessage is the size of an answer in bytes. The library's own limit
	// makes of a larger one a RESOURCE_EXHAUSTED, which to an orchestrator
	// says that the disk is full.
	maxMessage = 16 << 20
)

// dialOptions are those of every connection to a node.
var dialOptions = []grpc.DialOption{
	// How soon a node that comes back is found: the library's own limit is
	// two minutes, through which every call to the node would fail.
	grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
		MinConnectTimeout: 5 * time.Second,
	}),
	// How soon a node is given up that vanishes without closing its
	// connections: what is sent to it must be acknowledged within Timeout
	// (the library sets TCP_USER_TIMEOUT, RFC 5482), and a silence longer
	// than Time is ended with a question.
	grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 4 * time.Second, PermitWithoutStream: true}),
	grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	// A proxy that the environment names is for the world outside, and nodes
	// are within.
	grpc.WithNoProxy(),
}

// thrifty are those of connections of which there may be thousands, idle nearly
// always: the library keeps a buffer of 32 KiB for reading from each.
var thrifty = []grpc.DialOption{grpc.WithReadBufferSize(4 << 10)}

// Dial connects to a node.
func Dial(address string, c credentials.TransportCredentials, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient(address, slices.Concat(dialOptions, []grpc.DialOption{grpc.WithTransportCredentials(c)}, more)...)
}

// ServerOptions are what a node's server must be told to get on with the
// connections of a router.
func ServerOptions() []grpc.ServerOption { return serverOptions(time.Hour) }

// serverOptions has connections made anew at that age, with no call lost: a
// router's certificate is looked at in the handshake only, and one that has
// ended, or whose authority is trusted no more, must not go on being of use.
func serverOptions(age time.Duration) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			// The calls of a router that vanished are given up, too.
			Time: 20 * time.Second, Timeout: 10 * time.Second,
			MaxConnectionAge: age, MaxConnectionAgeGrace: time.Hour,
		}),
	}
}

// Node is one node of the fleet.
type Node struct {
	Segment string // of the topology and of IDs, unique in the fleet; see pool.NodeSegment
	Address string // host:port at which its driver serves peers; empty while it does not
}

// Discovery tells which nodes there are. A node that is down is still one: calls
// to it fail, and are repeated later. One that is not there any more is gone for
// good, and its volumes with it. While it does not know, as before it has read
// the first list, it must be an error, not an empty fleet.
type Discovery interface {
	// Nodes lists the nodes; the slice is the caller's. It may be a little
	// behind.
	Nodes(ctx context.Context) ([]Node, error)
	// Gone reports whether the node of that segment is gone for good, as of
	// now. It is asked before anything is given up for that reason.
	Gone(ctx context.Context, segment string) (bool, error)
}

// Static is a fleet that never changes.
type Static []Node

// Nodes implements [Discovery].
func (s Static) Nodes(context.Context) ([]Node, error) { return slices.Clone(s), nil }

// Gone implements [Discovery].
func (s Static) Gone(_ context.Context, segment string) (bool, error) {
	return !slices.ContainsFunc(s, func(n Node) bool { return n.Segment == segment }), nil
}

// fleet is the nodes and the connections to them.
type fleet struct {
	discovery   Discovery
	credentials func(segment string) credentials.TransportCredentials

	mu          sync.Mutex
	connections map[Node]*grpc.ClientConn
	known       []Node   // as they were last, ordered by segment
	members     []member // of those
}

// member is a node that can be called. A connection is made when it is needed,
// and again when it broke.
type member struct {
	Node
	csi.ControllerClient
	csi.SnapshotMetadataClient

	groupController csi.GroupControllerClient
	groups          peerapi.GroupsClient
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
	if !slices.Equal(nodes, f.known) {
		if err := f.learn(nodes); err != nil {
			return nil, err
		}
	}
	return slices.Clone(f.members), nil
}

// learn takes over a fleet that is another than before. It is called with the
// lock held.
func (f *fleet) learn(nodes []Node) error {
	f.known, f.members = nil, nil
	f.forget(nodes)
	members := make([]member, 0, len(nodes))
	for _, n := range nodes {
		connection, err := f.connect(n)
		if err != nil {
			return fmt.Errorf("node %s at %s: %w", n.Segment, n.Address, err)
		}
		members = append(members, member{n, csi.NewControllerClient(connection), csi.NewSnapshotMetadataClient(connection), csi.NewGroupControllerClient(connection), peerapi.NewGroupsClient(connection)})
	}
	f.known, f.members = nodes, members
	return nil
}

// connect gives the connection to a node. It is called with the lock held.
func (f *fleet) connect(n Node) (grpc.ClientConnInterface, error) {
	if n.Address == "" {
		return absent{}, nil
	}
	if connection, ok := f.connections[n]; ok {
		return connection, nil
	}
	connection, err := Dial(n.Address, f.credentials(n.Segment), thrifty...)
	if err != nil {
		return nil, err
	}
	f.connections[n] = connection
	return connection, nil
}

// forget closes the connections to nodes that are gone or have moved. It is
// called with the lock held.
func (f *fleet) forget(nodes []Node) {
	there := map[Node]bool{}
	for _, n := range nodes {
		there[n] = true
	}
	for n, connection := range f.connections {
		if !there[n] {
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

// question asks one node, and waits no longer than patience.
func question[T any](ctx context.Context, m member, call func(context.Context, member) (T, error)) answer[T] {
	patient, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	value, err := call(patient, m)
	return answer[T]{m, value, at(ctx, m, err)}
}

// ask asks all nodes at once, or as good as that, and gives their answers in the
// order of the nodes.
func ask[T any](ctx context.Context, members []member, call func(context.Context, member) (T, error)) []answer[T] {
	answers := make([]answer[T], len(members))
	turns := make(chan struct{}, atOnce)
	var calls sync.WaitGroup
	for i, m := range members {
		turns <- struct{}{}
		calls.Go(func() {
			answers[i] = question(ctx, m, call)
			<-turns
		})
	}
	calls.Wait()
	return answers
}
