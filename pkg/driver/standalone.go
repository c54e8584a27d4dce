package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/cgroup"
	"github.com/orlop-csi/orlop/pkg/cluster"
	"github.com/orlop-csi/orlop/pkg/config"
	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/kubelet"
	"github.com/orlop-csi/orlop/pkg/node"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/pool/image"
	"github.com/orlop-csi/orlop/pkg/router"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

// standalone is a driver with every service on one socket.
type standalone struct {
	options  Options
	config   config.Config
	registry *prometheus.Registry
	ready    readiness
	calls    *calls
	peer     *calls // for the router and other nodes; nil if there are none
	own      *peer.Credentials
	// connections are those that other nodes have opened for bytes.
	connections *transfer.Connections
	health      health

	certificate  *cluster.Certificate  // nil if it comes from files
	registration *kubelet.Registration // nil if there is no kubelet
}

// Standalone serves every CSI service for the pools of one machine, until ctx is
// done and the calls in flight have ended. Options must be valid. An error is
// one that keeps the driver from serving, or calls that had to be cut off.
//
// Volumes in use stay in use when it ends, however it ends.
func Standalone(ctx context.Context, o Options) error {
	c, err := config.Load(o.ConfigFile)
	if err != nil {
		return err
	}
	socket, err := listenAt(ctx, o.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	defer socket.Close()

	registry, metrics := newRegistry(o.Version)
	s := &standalone{options: o, config: c, registry: registry}
	s.health.ready = &s.ready
	s.calls = newCalls(socket, metrics, &s.ready, o.ShutdownTimeout)
	if o.KubeletRegistration != "" {
		if err := s.registerWithKubelet(); err != nil {
			return err
		}
	}
	if o.PeerAddress != "" {
		l, err := s.listenForRouter(ctx, metrics)
		if err != nil {
			return err
		}
		defer l.Close()
	}
	var parts []part
	if o.MetricsAddress != "" {
		l, err := net.Listen("tcp", o.MetricsAddress)
		if err != nil {
			return fmt.Errorf("--metrics-address: %w", err)
		}
		defer l.Close()
		s.options.MetricsAddress = l.Addr().String() // with the port, where 0 asked for any
		parts = append(parts, (&web{listener: l, metrics: registry, health: &s.health}).serve)
	}
	return run(ctx, append(parts, s.serve)...)
}

// serve is a [part]: it opens the pools, serves calls, and closes the pools.
func (s *standalone) serve(ctx context.Context) (err error) {
	s.ready.set("opening pools")
	engines, err := s.openPools(ctx)
	defer func() {
		// A call that was cut off and goes on regardless must not find its
		// pool closed; the end of the process is near.
		for _, e := range engines { // but nobody's writes may hang for good
			e.Thaw()
		}
		if s.calls.edge.inFlight.Load() > 0 || s.peer != nil && s.peer.edge.inFlight.Load() > 0 {
			return
		}
		for _, e := range slices.Backward(engines) {
			if closeErr := e.Close(); closeErr != nil {
				err = errors.Join(err, fmt.Errorf("closing pool %s: %w", e.Info().Name, closeErr))
			}
		}
	}()
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return nil // told to end while it was starting
	case err != nil:
		return err
	}

	set, err := pool.NewSet(s.options.NodeID, engines...)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", s.options.ConfigFile, err)
	}
	limiter := cgroup.NewLimiter(func(err error) { klog.ErrorS(err, "Limits of a new container") })
	defer limiter.Close()
	nodeService, err := node.New(set, limiter)
	if err != nil {
		return err
	}
	copies := s.newCopies()
	controllerService, err := controller.New(set, nodeService, copies)
	if err != nil {
		return err
	}
	defer controllerService.Close()
	csi.RegisterIdentityServer(s.calls.server, &identity{version: s.options.Version, ready: &s.ready})
	csi.RegisterControllerServer(s.calls.server, controllerService)
	csi.RegisterSnapshotMetadataServer(s.calls.server, controllerService)
	csi.RegisterGroupControllerServer(s.calls.server, controllerService)
	csi.RegisterNodeServer(s.calls.server, nodeService)
	serve := []part{s.calls.serve}
	if s.peer != nil { // what a router needs, and no more
		csi.RegisterControllerServer(s.peer.server, controllerService)
		csi.RegisterSnapshotMetadataServer(s.peer.server, controllerService)
		csi.RegisterGroupControllerServer(s.peer.server, controllerService)
		peerapi.RegisterGroupsServer(s.peer.server, controller.NewGroups(set))
		peerapi.RegisterCopiesServer(s.peer.server, transfer.NewServer(set, copies, s.connections, s.allowCopy))
		serve = append(serve, s.peer.serve)
	}
	if s.certificate != nil {
		serve = append(serve, s.certificate.Run)
	}
	if s.registration != nil { // when everything else is ready; and withdrawn first
		serve = append(serve, s.registration.Serve)
	}

	collector := poolCollector[pool.Engine](engines)
	s.registry.MustRegister(collector)
	defer s.registry.Unregister(collector)
	conditions := conditionCollector(func(ctx context.Context) ([]pool.Unhealthy, error) {
		all, _, err := set.Unhealthy(ctx, nodeService.VolumesHealth, "", 0)
		return all, err
	})
	s.registry.MustRegister(conditions)
	defer s.registry.Unregister(conditions)

	for _, err := range nodeService.EnforceAllLimits() {
		klog.ErrorS(err, "Limits of a volume in use")
	}

	// Only now, so that a start that fails says nothing but why.
	for _, e := range engines {
		info, counts := e.Info(), e.Counts()
		klog.InfoS("Pool", "pool", info.Name, "id", info.ID, "reflink", info.Reflink,
			"volumes", counts.Volumes, "snapshots", counts.Snapshots, "damaged", counts.Damaged)
	}
	klog.InfoS("Serving", "version", s.options.Version, "node", s.options.NodeID, "endpoint", s.options.Endpoint, "metrics", s.options.MetricsAddress, "peer", s.options.PeerAddress)
	return run(ctx, serve...)
}

// listenForRouter opens the port on which the router can call this node, and
// other nodes can read what the router allows them to.
func (s *standalone) listenForRouter(ctx context.Context, metrics *callMetrics) (net.Listener, error) {
	own, err := s.nodeCredentials()
	if err != nil {
		return nil, err
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", s.options.PeerAddress)
	if err != nil {
		return nil, fmt.Errorf("--peer-address: %w", err)
	}
	s.options.PeerAddress = l.Addr().String() // with the port, where 0 asked for any
	s.connections = transfer.NewConnections()
	s.peer = newCalls(l, metrics, &s.ready, s.options.ShutdownTimeout, append(router.ServerOptions(), grpc.Creds(withBytes{own, s.connections}))...)
	s.peer.edge.guard = mayCall
	return l, nil
}

// openPools opens the pools in turn. Those that it has opened it gives even when
// one fails.
func (s *standalone) openPools(ctx context.Context) (engines []pool.Engine, err error) {
	switch err := os.Mkdir(s.options.StateDir, 0o700); {
	case errors.Is(err, fs.ErrExist):
	case err != nil:
		return nil, fmt.Errorf("--state-dir: %w", err)
	default:
		defer func() {
			if len(engines) == 0 {
				os.Remove(s.options.StateDir) // a start that fails leaves nothing, and this is empty
			}
		}()
	}
	poolOptions := func(p config.Pool) image.Options {
		return image.Options{Node: s.options.NodeID, StateDir: s.options.StateDir, Pool: p}
	}
	at := func(i int, err error) error {
		return fmt.Errorf("configuration %s: pools[%d]: %w", s.options.ConfigFile, i, err)
	}
	for i, p := range s.config.Pools { // before anything is made for any of them
		if err := image.Check(ctx, poolOptions(p)); err != nil {
			return nil, at(i, err)
		}
	}
	for i, p := range s.config.Pools {
		e, err := image.Open(ctx, poolOptions(p))
		if err != nil {
			return engines, at(i, err)
		}
		engines = append(engines, e)
	}
	return engines, nil
}
