package driver

import (
	"context"
	"fmt"
	"net"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/credentials"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/router"
)

// Router serves CSI Identity and Controller for a fleet of nodes, until ctx is
// done and the calls in flight have ended. Options must be valid.
func Router(ctx context.Context, o RouterOptions) error {
	own, err := peer.Load(o.TLSDir)
	if err != nil {
		return fmt.Errorf("--tls-dir: %w", err)
	}
	var nodes router.Static
	for name, address := range o.Nodes {
		segment, err := pool.NodeSegment(name)
		if err != nil {
			return fmt.Errorf("--node: %w", err)
		}
		nodes = append(nodes, router.Node{Segment: segment, Address: address})
	}
	service := router.New(nodes, func(segment string) credentials.TransportCredentials {
		return credentials.NewTLS(own.Client(segment))
	})
	defer service.Close()

	socket, err := listenAt(ctx, o.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	defer socket.Close()
	var ready readiness
	registry, metrics := newRegistry(o.Version)
	calls := newCalls(socket, metrics, &ready, o.ShutdownTimeout)
	csi.RegisterIdentityServer(calls.server, &identity{version: o.Version, ready: &ready})
	csi.RegisterControllerServer(calls.server, service)
	var parts []part
	if o.MetricsAddress != "" {
		l, err := net.Listen("tcp", o.MetricsAddress)
		if err != nil {
			return fmt.Errorf("--metrics-address: %w", err)
		}
		defer l.Close()
		o.MetricsAddress = l.Addr().String()
		parts = append(parts, (&web{listener: l, metrics: registry, ready: &ready}).serve)
	}
	klog.InfoS("Serving", "version", o.Version, "nodes", len(nodes), "endpoint", o.Endpoint, "metrics", o.MetricsAddress)
	return run(ctx, append(parts, calls.serve)...)
}
