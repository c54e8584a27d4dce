package driver

import (
	"context"
	"fmt"
	"net"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/credentials"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/cluster"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/router"
)

// fleet is what a router must know of its nodes.
type fleet struct {
	nodes  router.Discovery
	own    *peer.Credentials
	claims router.Claimer // nil if nothing is known of claims
	health health
	// parts keep that up to date; they may use the router.
	parts func(*router.Server) []part
}

// Router serves CSI Identity, Controller, GroupController and SnapshotMetadata for
// a fleet of nodes, until ctx is done and the calls in flight have ended. Options
// must be valid.
func Router(ctx context.Context, o RouterOptions) error {
	find := staticFleet
	if o.Kubernetes {
		find = clusterFleet
	}
	f, err := find(o)
	if err != nil {
		return err
	}
	service := router.New(f.nodes, func(segment string) credentials.TransportCredentials {
		return credentials.NewTLS(f.own.Client(segment))
	}, f.own.Sign)
	defer service.Close()

	socket, err := listenAt(ctx, o.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	defer socket.Close()
	var ready readiness
	f.health.ready = &ready
	registry, metrics := newRegistry(o.Version)
	registry.MustRegister(certificateExpiry(f.own))
	if o.Kubernetes {
		registry.MustRegister(nodesCollector{f.nodes})
	}
	calls := newCalls(socket, metrics, &ready, o.ShutdownTimeout)
	csi.RegisterIdentityServer(calls.server, &identity{version: o.Version, ready: &ready})
	csi.RegisterControllerServer(calls.server, service)
	csi.RegisterSnapshotMetadataServer(calls.server, service)
	csi.RegisterGroupControllerServer(calls.server, service)
	found := &orphanCollector{}
	registry.MustRegister(found)
	orphans := router.NewOrphans(service, f.claims, o.OrphanGracePeriod, found.observe)
	orphans.Register(calls.server)
	var parts []part
	if o.MetricsAddress != "" {
		l, err := net.Listen("tcp", o.MetricsAddress)
		if err != nil {
			return fmt.Errorf("--metrics-address: %w", err)
		}
		defer l.Close()
		o.MetricsAddress = l.Addr().String()
		parts = append(parts, (&web{listener: l, metrics: registry, health: &f.health}).serve)
	}
	if f.parts != nil {
		parts = append(parts, f.parts(service)...)
	}
	if f.claims != nil {
		parts = append(parts, orphans.Run)
	}
	klog.InfoS("Serving", "version", o.Version, "kubernetes", o.Kubernetes, "nodes", len(o.Nodes), "endpoint", o.Endpoint, "metrics", o.MetricsAddress)
	return run(ctx, append(parts, calls.serve)...)
}

// staticFleet is the nodes that were given, and credentials from files.
func staticFleet(o RouterOptions) (*fleet, error) {
	own, err := peer.Load(o.TLSDir)
	if err != nil {
		return nil, fmt.Errorf("--tls-dir: %w", err)
	}
	var nodes router.Static
	for name, address := range o.Nodes {
		segment, err := pool.NodeSegment(name)
		if err != nil {
			return nil, fmt.Errorf("--node: %w", err)
		}
		nodes = append(nodes, router.Node{Segment: segment, Address: address})
	}
	f := &fleet{nodes: nodes, own: own}
	if o.ClaimsFile != "" {
		f.claims = router.FileClaims(o.ClaimsFile)
		if _, err := f.claims.Claimed(context.Background()); err != nil {
			return nil, fmt.Errorf("--claims-file: %w", err)
		}
	}
	return f, nil
}

// clusterFleet is the nodes of a Kubernetes cluster, and credentials from an
// authority that the routers keep there.
func clusterFleet(o RouterOptions) (*fleet, error) {
	client, err := cluster.Connect(o.Kubeconfig, userAgent(o.Version))
	if err != nil {
		return nil, fmt.Errorf("--kubernetes: %w", err)
	}
	if o.Namespace == "" {
		if o.Namespace, err = cluster.Namespace(); err != nil {
			return nil, fmt.Errorf("--namespace: %w", err)
		}
	}
	nodes, err := client.Fleet(Name, o.Namespace, o.NodeService)
	if err != nil {
		return nil, err
	}
	keeper := client.Keeper(o.Namespace, o.CASecret, report)
	claims := cluster.Claims{Client: client, Driver: Name}
	f := &fleet{nodes: nodes, own: peer.New(keeper.Keys), claims: clusterClaims{claims}}
	f.health.awaited = []func() error{nodes.Problem, keeper.Problem}
	f.parts = func(s *router.Server) []part {
		return []part{
			nodes.Run,
			keeper.Run,
			func(ctx context.Context) error {
				return client.Sign(ctx, keeper, o.Namespace, o.NodeAccount, report)
			},
			func(ctx context.Context) error { return client.Untaint(ctx, nodes, s.Answers, report) },
			func(ctx context.Context) error { return claims.TellHealth(ctx, nodes, s.Health, report) },
		}
	}
	return f, nil
}
