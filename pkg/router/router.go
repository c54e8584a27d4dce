package router

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// Server implements csi.ControllerServer, csi.GroupControllerServer
// and csi.SnapshotMetadataServer by forwarding.
type Server struct {
	csi.UnimplementedControllerServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer

	fleet fleet
	// names keeps calls that make something of the same name from overlapping:
	// each could find no trace of the other, and take another node.
	names pool.Operations
	// sign lets a node read a snapshot of another.
	sign func(peer.Ticket) ([]byte, error)
}

// New makes the service. The credentials for a node must accept that node and
// no other; sign makes tickets that nodes accept.
func New(d Discovery, nodeCredentials func(segment string) credentials.TransportCredentials, sign func(peer.Ticket) ([]byte, error)) *Server {
	return &Server{
		fleet: fleet{discovery: d, credentials: nodeCredentials, connections: map[Node]*grpc.ClientConn{}},
		sign:  sign,
	}
}

// Close ends the connections to the nodes.
func (s *Server) Close() error { return s.fleet.close() }

// Answers reports whether the driver of a node serves the router; nil if so.
func (s *Server) Answers(ctx context.Context, segment string) error {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return err
	}
	for _, m := range members {
		if m.Segment == segment {
			_, err := m.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
			return at(ctx, m, err)
		}
	}
	return pool.Errorf(pool.ErrNotFound, "there is no node %s", segment)
}

// ControllerGetCapabilities implements csi.ControllerServer: what the nodes can
// do, the router can.
func (s *Server) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return controller.Capabilities(), nil
}

// owner finds the node that has the pool of a volume or snapshot, by its ID;
// whether that is still in the pool, the node knows. An ID tells the node that
// it was made on, which is asked first. The disk may live in another by now,
// whether or not the first is still there, so that then all are asked.
//
// It is pool.ErrNotFound if the ID cannot be one, or no node has the pool; and
// pool.ErrUnavailable if one that might have it does not answer.
func (s *Server) owner(ctx context.Context, id string) (member, error) {
	parsed, err := pool.ParseID(id)
	if err != nil {
		return member{}, err
	}
	members, err := s.fleet.list(ctx)
	if err != nil {
		return member{}, err
	}
	holds := func(ctx context.Context, m member) (bool, error) { return holds(ctx, m, id) }
	what := "is gone"
	if i := slices.IndexFunc(members, func(m member) bool { return m.Segment == parsed.Node }); i >= 0 {
		a := question(ctx, members[i], holds)
		if a.err != nil || a.value {
			return members[i], a.err
		}
		members = slices.Delete(members, i, i+1)
		what = "does not have its pool any more"
	} else if gone, err := s.fleet.discovery.Gone(ctx, parsed.Node); err != nil || !gone {
		return member{}, pool.Errorf(pool.ErrUnavailable, "node %s, which made %s, is there, or may be, and has not been found yet: %w", parsed.Node, id, cmp.Or(err, errComing))
	}
	var unanswered error
	for _, a := range ask(ctx, members, holds) {
		switch {
		case a.value:
			return a.member, nil
		case a.err != nil && unanswered == nil:
			unanswered = pool.Errorf(pool.ErrUnavailable, "node %s, which made %s, %s, and whether another has the disk is unknown: %s", parsed.Node, id, what, said(a.err))
		}
	}
	if err := ended(ctx); err != nil {
		return member{}, err
	}
	if unanswered != nil {
		return member{}, unanswered
	}
	return member{}, pool.Errorf(pool.ErrNotFound, "%s does not exist: node %s %s, and no other has the disk", id, parsed.Node, what)
}

// errComing is about a node that has just joined, or joined again.
var errComing = errors.New("it is about to be; repeat the call")

// holds asks a node whether it has the pool of a volume or snapshot.
func holds(ctx context.Context, m member, id string) (bool, error) {
	var trailer metadata.MD
	_, err := m.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id}, grpc.Trailer(&trailer))
	switch {
	case request.HoldsPool(trailer): // whatever else it says
		return true, nil
	case err == nil || is(err, codes.NotFound):
		return false, nil
	default:
		return false, err
	}
}

// forward makes a call on the node that has a volume or snapshot.
func forward[Request, Response any](
	ctx context.Context, s *Server, r Request, field, id string,
	call func(csi.ControllerClient, context.Context, Request, ...grpc.CallOption) (Response, error),
) (Response, error) {
	var none Response
	if err := request.Required(field, id); err != nil {
		return none, err
	}
	m, err := s.owner(ctx, id)
	if err != nil {
		return none, err
	}
	response, err := call(m.ControllerClient, ctx, r)
	return response, at(ctx, m, err)
}

// ControllerExpandVolume implements csi.ControllerServer.
func (s *Server) ControllerExpandVolume(ctx context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	return forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.ControllerExpandVolume)
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (s *Server) ValidateVolumeCapabilities(ctx context.Context, r *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	return forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.ValidateVolumeCapabilities)
}

// ControllerGetVolume implements csi.ControllerServer.
func (s *Server) ControllerGetVolume(ctx context.Context, r *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	return forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.ControllerGetVolume)
}

// ControllerGetVolumeHealth implements csi.ControllerServer.
func (s *Server) ControllerGetVolumeHealth(ctx context.Context, r *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	return forward(ctx, s, r, "volume_id", r.GetVolumeId(), csi.ControllerClient.ControllerGetVolumeHealth)
}

// GetSnapshot implements csi.ControllerServer.
func (s *Server) GetSnapshot(ctx context.Context, r *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	return forward(ctx, s, r, "snapshot_id", r.GetSnapshotId(), csi.ControllerClient.GetSnapshot)
}
