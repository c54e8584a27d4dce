//go:build integration

package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/router"
	"github.com/orlop-csi/orlop/pkg/transfer"
	"github.com/orlop-csi/orlop/tests/harness"
)

// memoryEngine is an engine without a disk: it keeps its catalog and nothing
// else. The methods that it lacks panic.
type memoryEngine struct {
	pool.Engine

	info    pool.Info
	segment string
	mu      sync.Mutex
	volumes map[string]pool.Volume
}

func (m *memoryEngine) Info() pool.Info { return m.info }

func (*memoryEngine) Copies() []string                      { return nil }
func (*memoryEngine) Snapshots(string, int) []pool.Snapshot { return nil }

func (*memoryEngine) Capacity(context.Context) (pool.Capacity, error) {
	return pool.Capacity{Available: 1 << 40, Thick: 1 << 40}, nil
}

func (m *memoryEngine) CreateVolume(_ context.Context, s pool.VolumeSpec) (pool.Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := pool.NameFor(s.RequestName)
	v := pool.Volume{ID: pool.ID{Node: m.segment, Pool: m.info.ID, Name: name}.String(), Name: name, RequestName: s.RequestName, Size: s.Size, Access: s.Access}
	m.volumes[name] = v
	return v, nil
}

func (m *memoryEngine) Volume(name string) (pool.Volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.volumes[name]
	if !ok {
		return v, pool.Errorf(pool.ErrNotFound, "%s is not there", name)
	}
	return v, nil
}

func (m *memoryEngine) Volumes(after string, most int) (list []pool.Volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(m.volumes)) {
		if name > after && (most == 0 || len(list) < most) {
			list = append(list, m.volumes[name])
		}
	}
	return list
}

// unused is the users of the volumes of such a node: there are none.
type unused struct{}

func (unused) EnforceLimits(pool.Engine, pool.Volume) error { return nil }

func (unused) VolumesHealth(context.Context, pool.Engine, []string) (map[string][]pool.Condition, error) {
	return nil, nil
}

// fleetOf serves so many nodes: for each the real Controller service over an
// engine in memory, a real server, and a certificate of its own. It gives the
// real router's process in front of them, their addresses, and the router's
// credentials.
func fleetOf(b *testing.B, n int) (d *harness.Driver, addresses []string, own *peer.Credentials) {
	b.Helper()
	a := harness.NewAuthority(b)
	d = harness.New(b, "")
	d.Mode = "controller"
	until := time.Now().Add(time.Hour)
	tls := filepath.Join(d.Dir, "tls")
	a.Issue(tls, peer.Controller(), until)
	d.Args = []string{"--tls-dir", tls}
	dir := b.TempDir()
	for i := range n {
		segment := segmentOf(i)
		a.Issue(filepath.Join(dir, segment), peer.Node(segment), until)
		credentialsOf, err := peer.Load(filepath.Join(dir, segment))
		must(b, err)
		engine := &memoryEngine{info: pool.Info{ID: pool.NewPoolID(), Name: pool.DefaultPool, Reflink: true}, segment: segment, volumes: map[string]pool.Volume{}}
		set, err := pool.NewSet(segment, engine)
		must(b, err)
		service, err := controller.New(set, unused{}, transfer.New(transfer.Options{}))
		must(b, err)
		server := grpc.NewServer(append(router.ServerOptions(), grpc.Creds(credentials.NewTLS(credentialsOf.Server())), grpc.UnaryInterceptor(notFound))...)
		csi.RegisterControllerServer(server, service)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(b, err)
		go func() { _ = server.Serve(l) }() // until it is stopped
		b.Cleanup(func() {
			server.Stop()
			service.Close()
		})
		addresses = append(addresses, l.Addr().String())
		d.Args = append(d.Args, "--node", segment+"="+addresses[i])
	}
	d.Start()
	own, err := peer.Load(tls)
	must(b, err)
	return d, addresses, own
}

func segmentOf(i int) string { return fmt.Sprintf("node-%04d", i) }

// notFound is all of package driver's codes that such a node needs.
func notFound(ctx context.Context, r any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	response, err := handle(ctx, r)
	if errors.Is(err, pool.ErrNotFound) {
		err = status.Error(codes.NotFound, err.Error())
	}
	return response, err
}

func newVolume(segment string) *csi.CreateVolumeRequest {
	r := &csi.CreateVolumeRequest{
		Name:               fmt.Sprintf("pvc-%d", time.Now().UnixNano()),
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)},
	}
	if segment != "" {
		only := []*csi.Topology{{Segments: map[string]string{request.TopologyKey: segment}}}
		r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: only, Preferred: only}
	}
	return r
}

// BenchmarkRouter measures the router before many nodes: what it adds to
// CreateVolume for one node, against the same call to the node itself, in turns;
// CreateVolume for any node, for which it asks all; GetCapacity of one node and
// of all; ListVolumes; and its resident memory. The nodes are all in one
// process, beside it on the same processors.
func BenchmarkRouter(b *testing.B) {
	for _, n := range pick([]int{10, 1000}, []int{100}) {
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			d, addresses, own := fleetOf(b, n)
			idle := residentMiB(b, d.Pid())
			direct := make([]csi.ControllerClient, min(n, 16))
			for i := range direct {
				conn, err := router.Dial(addresses[i], credentials.NewTLS(own.Client(segmentOf(i))))
				must(b, err)
				b.Cleanup(func() { conn.Close() })
				direct[i] = csi.NewControllerClient(conn)
			}
			ctx := context.Background()
			b.Run("CreateVolume-one-node", func(b *testing.B) {
				var through, past []time.Duration
				for i := range b.N + len(direct) {
					at := i % len(direct)
					begin := time.Now()
					_, err := d.CreateVolume(ctx, newVolume(segmentOf(at)))
					must(b, err)
					middle := time.Now()
					_, err = direct[at].CreateVolume(ctx, newVolume(segmentOf(at)))
					must(b, err)
					if i >= len(direct) { // all are connected
						through, past = append(through, middle.Sub(begin)), append(past, time.Since(middle))
					}
				}
				reportLatency(b, through)
				b.ReportMetric(ms(quantile(past, 0.5)), "direct-p50-ms")
				b.ReportMetric(ms(quantile(through, 0.5)-quantile(past, 0.5)), "overhead-p50-ms")
			})
			for _, question := range []struct {
				name string
				ask  func() error
			}{
				{"CreateVolume-any-node", func() error {
					_, err := d.CreateVolume(ctx, newVolume(""))
					return err
				}},
				{"GetCapacity-one-node", func() error {
					_, err := d.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{request.TopologyKey: segmentOf(0)}}})
					return err
				}},
				{"GetCapacity-all", func() error {
					_, err := d.GetCapacity(ctx, &csi.GetCapacityRequest{})
					return err
				}},
				{"ListVolumes-10", func() error {
					_, err := d.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 10})
					return err
				}},
				{"ListVolumes-all", func() error {
					_, err := d.ListVolumes(ctx, &csi.ListVolumesRequest{})
					return err
				}},
			} {
				b.Run(question.name, func(b *testing.B) {
					must(b, question.ask())
					took := make([]time.Duration, b.N)
					for i := range took {
						begin := time.Now()
						must(b, question.ask())
						took[i] = time.Since(begin)
					}
					reportLatency(b, took)
				})
			}
			b.Run("memory", func(b *testing.B) {
				b.ReportMetric(idle, "start-MiB")
				b.ReportMetric(residentMiB(b, d.Pid()), "connected-MiB")
				b.ReportMetric(0, "ns/op")
			})
		})
	}
}
