package router

import (
	"context"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

// memory is an engine that keeps its catalog and nothing else. The methods that
// it lacks panic.
type memory struct {
	pool.Engine

	info pool.Info
	node string

	mu        sync.Mutex
	room      int64
	volumes   map[string]pool.Volume
	snapshots map[string]pool.Snapshot
	sick      map[string][]pool.Condition
}

func (m *memory) Info() pool.Info   { return m.info }
func (m *memory) Damaged() []string { return nil }

func (m *memory) VolumesHealth(context.Context, []string) (map[string][]pool.Condition, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.sick), nil
}

func (m *memory) Capacity(context.Context) (pool.Capacity, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return pool.Capacity{Available: m.room, Thick: m.room}, nil
}

func (m *memory) CreateVolume(_ context.Context, s pool.VolumeSpec) (pool.Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := pool.NameFor(s.RequestName)
	if v, ok := m.volumes[name]; ok {
		if v.Size < s.Size {
			return v, pool.Errorf(pool.ErrExists, "volume %s exists with %d bytes", v.ID, v.Size)
		}
		return v, nil
	}
	if s.Size > m.room {
		return pool.Volume{}, pool.Errorf(pool.ErrNoSpace, "%d bytes are left", m.room)
	}
	m.room -= s.Size
	v := pool.Volume{
		ID: pool.ID{Node: m.node, Pool: m.info.ID, Name: name}.String(), Name: name, RequestName: s.RequestName, Size: s.Size, Access: s.Access, Source: s.Source,
	}
	m.volumes[name] = v
	return v, nil
}

func (m *memory) DeleteVolume(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.room += m.volumes[name].Size
	delete(m.volumes, name)
	return nil
}

func (m *memory) Volume(name string) (pool.Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.volumes[name]
	if !ok {
		return v, pool.Errorf(pool.ErrNotFound, "%s is not there", name)
	}
	return v, nil
}

func (m *memory) Volumes(after string, max int) []pool.Volume {
	m.mu.Lock()
	defer m.mu.Unlock()
	return page(m.volumes, after, max)
}

func (m *memory) CreateSnapshot(_ context.Context, s pool.SnapshotSpec) (pool.Snapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := pool.NameFor(s.RequestName)
	snapshot := pool.Snapshot{
		ID: pool.ID{Node: m.node, Pool: m.info.ID, Name: name}.String(), Name: name, RequestName: s.RequestName, SourceID: m.volumes[s.Volume].ID,
	}
	m.snapshots[name] = snapshot
	return snapshot, nil
}

func (m *memory) DeleteSnapshot(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.snapshots, name)
	return nil
}

func (m *memory) Snapshot(name string) (pool.Snapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, ok := m.snapshots[name]
	if !ok {
		return s, pool.Errorf(pool.ErrNotFound, "%s is not there", name)
	}
	return s, nil
}

func (m *memory) Snapshots(after string, max int) []pool.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return page(m.snapshots, after, max)
}

func page[T any](entries map[string]T, after string, max int) []T {
	var list []T
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		if name > after && (max == 0 || len(list) < max) {
			list = append(list, entries[name])
		}
	}
	return list
}

// testNode is a node: the real Controller service over an engine in memory,
// behind a real gRPC server.
type testNode struct {
	Node
	*memory

	server *grpc.Server
	calls  atomic.Int64
	// before is called before a call is served, with the name of its method;
	// its error is the call's.
	before atomic.Pointer[func(ctx context.Context, method string) error]
}

func (n *testNode) Before(f func(ctx context.Context, method string) error) { n.before.Store(&f) }

// testCodes is what of the codes that package driver makes these tests meet.
var testCodes = map[error]codes.Code{
	pool.ErrNotFound: codes.NotFound, pool.ErrExists: codes.AlreadyExists, pool.ErrNoSpace: codes.ResourceExhausted,
	pool.ErrBusy: codes.Aborted, pool.ErrToken: codes.Aborted, pool.ErrInvalid: codes.InvalidArgument,
	pool.ErrUnavailable: codes.Unavailable, pool.ErrTimeout: codes.DeadlineExceeded, pool.ErrOutOfRange: codes.OutOfRange,
	pool.ErrInUse: codes.FailedPrecondition, pool.ErrPrecondition: codes.FailedPrecondition,
}

// wantCode fails the test unless package driver would make of an error, of a
// call or of the server itself, that code.
func wantCode(t *testing.T, what string, err error, code codes.Code) {
	t.Helper()
	got := testCodes[pool.Kind(err)]
	if s, ok := status.FromError(err); ok {
		got = s.Code()
	} else if pool.Kind(err) == nil {
		got = status.FromContextError(err).Code()
	}
	if got != code {
		t.Errorf("%s: %v; want %s", what, err, code)
	}
}

func (n *testNode) intercept(ctx context.Context, r any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	n.calls.Add(1)
	if before := n.before.Load(); before != nil {
		if err := (*before)(ctx, path.Base(info.FullMethod)); err != nil {
			return nil, err
		}
	}
	response, err := handle(ctx, r)
	if kind := pool.Kind(err); kind != nil {
		err = status.Error(testCodes[kind], err.Error())
	}
	return response, err
}

// startNode starts a node with that much room. Its server ends with the test.
func startNode(t *testing.T, segment string, room int64) *testNode {
	t.Helper()
	n := &testNode{memory: &memory{
		info: pool.Info{ID: pool.NewPoolID(), Name: pool.DefaultPool, Reflink: true}, node: segment,
		room: room, volumes: map[string]pool.Volume{}, snapshots: map[string]pool.Snapshot{},
	}}
	n.serve(t, segment, n.memory)
	return n
}

// nobody uses a volume of such a node.
type nobody struct{}

func (nobody) EnforceLimits(pool.Engine, pool.Volume) error { return nil }

func (nobody) VolumesHealth(ctx context.Context, e pool.Engine, names []string) (map[string][]pool.Condition, error) {
	return e.VolumesHealth(ctx, names)
}

func (n *testNode) serve(t *testing.T, segment string, engines ...pool.Engine) {
	t.Helper()
	set, err := pool.NewSet(segment, engines...)
	if err != nil {
		t.Fatal(err)
	}
	service, err := controller.New(set, nobody{}, transfer.New(transfer.Options{}))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.Node = Node{Segment: segment, Address: l.Addr().String()}
	n.server = grpc.NewServer(append(ServerOptions(), grpc.UnaryInterceptor(n.intercept))...)
	csi.RegisterControllerServer(n.server, service)
	go func() { _ = n.server.Serve(l) }() // until it is stopped
	t.Cleanup(func() {
		n.server.Stop()
		service.Close()
	})
}

// discovered is a fleet that a test changes.
type discovered struct {
	mu    sync.Mutex
	nodes []Node
	late  []Node // those that Nodes has not heard of yet
	err   error
}

func (d *discovered) Gone(ctx context.Context, segment string) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	gone, _ := Static(slices.Concat(d.nodes, d.late)).Gone(ctx, segment)
	return gone, d.err
}

func (d *discovered) Nodes(context.Context) ([]Node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.nodes), d.err
}

func (d *discovered) Set(nodes ...Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nodes = nodes
}

const gib = int64(1) << 30

// startFleet starts a node for each room, called node-1 and so on, and makes a
// router for them.
func startFleet(t *testing.T, rooms ...int64) (*Server, *discovered, []*testNode) {
	t.Helper()
	d := &discovered{}
	var nodes []*testNode
	for i, room := range rooms {
		n := startNode(t, fmt.Sprintf("node-%d", i+1), room)
		nodes = append(nodes, n)
		d.nodes = append(d.nodes, n.Node)
	}
	s := New(d, func(string) credentials.TransportCredentials { return insecure.NewCredentials() }, unsigned)
	t.Cleanup(func() { s.Close() })
	return s, d, nodes
}

// volume is a request for a block volume of 1 GiB; change alters it.
func volume(name string, change ...func(*csi.CreateVolumeRequest)) *csi.CreateVolumeRequest {
	r := &csi.CreateVolumeRequest{
		Name:          name,
		CapacityRange: &csi.CapacityRange{RequiredBytes: gib},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}},
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func topologies(segments ...string) (all []*csi.Topology) {
	for _, s := range segments {
		all = append(all, &csi.Topology{Segments: map[string]string{request.TopologyKey: s}})
	}
	return all
}

// among allows nodes only.
func among(segments ...string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		if r.AccessibilityRequirements == nil {
			r.AccessibilityRequirements = &csi.TopologyRequirement{}
		}
		r.AccessibilityRequirements.Requisite = topologies(segments...)
	}
}

// preferring prefers nodes, in that order.
func preferring(segments ...string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		if r.AccessibilityRequirements == nil {
			r.AccessibilityRequirements = &csi.TopologyRequirement{}
		}
		r.AccessibilityRequirements.Preferred = topologies(segments...)
	}
}

// made makes a volume and gives its ID.
func made(t *testing.T, s *Server, r *csi.CreateVolumeRequest) string {
	t.Helper()
	response, err := s.CreateVolume(t.Context(), r)
	if err != nil {
		t.Fatalf("CreateVolume %s: %v", r.GetName(), err)
	}
	return response.GetVolume().GetVolumeId()
}

func nodeOf(id string) string {
	parsed, _ := pool.ParseID(id)
	return parsed.Node
}

// soon waits until a condition holds.
func soon(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so after 30 s: %s", what)
		}
	}
}

var errUnavailable = status.Error(codes.Unavailable, "as the test wants")

func failing(methods ...string) func(context.Context, string) error {
	return func(_ context.Context, method string) error {
		if len(methods) == 0 || slices.Contains(methods, method) {
			return errUnavailable
		}
		return nil
	}
}

// unsigned makes tickets that no node looks at.
func unsigned(peer.Ticket) ([]byte, error) { return nil, nil }
