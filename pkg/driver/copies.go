package driver

import (
	"context"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/router"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

var (
	copiesMetric = Metric{
		Name: "orlop_copies_in_progress",
		Type: "gauge",
		Help: "Volumes that are being copied to this node or between its pools.",
	}
	copiedMetric = Metric{
		Name: "orlop_copy_received_bytes_total",
		Type: "counter",
		Help: "Bytes of snapshots that came from other nodes to make volumes of.",
	}
)

// mayCall judges who is at the other end of the port for peers: the router may
// call everything, a node may only read snapshots, for which it needs a ticket.
func mayCall(ctx context.Context, method string) error {
	segment, err := caller(ctx)
	if err != nil {
		return err
	}
	if segment != "" && !strings.HasPrefix(method, "/"+peerapi.Copies_ServiceDesc.ServiceName+"/") {
		return status.Errorf(codes.PermissionDenied, "node %s may not call %s: only the router may", segment, method)
	}
	return nil
}

// caller is the segment of the node that makes a call, or "" for the router.
func caller(ctx context.Context) (string, error) {
	if p, ok := grpcpeer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			segment, err := peer.Caller(info.State)
			if err != nil {
				return "", status.Error(codes.Unauthenticated, err.Error())
			}
			return segment, nil
		}
	}
	return "", status.Error(codes.Unauthenticated, "the call does not come over TLS")
}

// allowCopy is a [transfer.Allow].
func (s *standalone) allowCopy(ctx context.Context, ticket []byte, snapshotID string) (reader string, err error) {
	segment, err := caller(ctx)
	if err != nil {
		return "", err
	}
	t, err := s.own.Redeem(ticket, time.Now())
	if err != nil {
		return "", status.Error(codes.PermissionDenied, err.Error())
	}
	if t.Reader != segment || t.Snapshot != snapshotID {
		return "", status.Errorf(codes.PermissionDenied, "the ticket lets node %s read %s; this is node %q for %s", t.Reader, t.Snapshot, segment, snapshotID)
	}
	return segment, nil
}

// newCopies makes room for the copies to this node, and metrics of them.
func (s *standalone) newCopies() *transfer.Copies {
	o := transfer.Options{Bandwidth: s.options.CopyBandwidth, Abandon: s.options.CopyAbandon, Report: report}
	if s.own != nil {
		o.Dial = func(segment, address string) (*grpc.ClientConn, error) {
			return router.Dial(address, credentials.NewTLS(s.own.Client(segment)))
		}
		o.Open = func(ctx context.Context, segment, address string) (net.Conn, error) {
			return openForBytes(ctx, s.own, segment, address)
		}
	}
	copies := transfer.New(o)
	s.registry.MustRegister(copyCollectors(copies)...)
	return copies
}

func copyCollectors(c *transfer.Copies) []prometheus.Collector {
	return []prometheus.Collector{
		gaugeOf(copiesMetric, func() float64 { return float64(c.InFlight()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: copiedMetric.Name, Help: copiedMetric.Help}, func() float64 {
			return float64(c.Received())
		}),
	}
}
