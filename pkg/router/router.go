package router

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// Server implements csi.ControllerServer by forwarding.
type Server struct {
	csi.UnimplementedControllerServer

	fleet fleet
}

// New makes the service. The credentials for a node must accept that node and
// no other.
func New(d Discovery, nodeCredentials func(segment string) credentials.TransportCredentials) *Server {
	return &Server{fleet: fleet{discovery: d, credentials: nodeCredentials, connections: map[Node]*grpc.ClientConn{}}}
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
			return at(m, err)
		}
	}
	return pool.Errorf(pool.ErrNotFound, "there is no node %s", segment)
}

// ControllerGetCapabilities implements csi.ControllerServer: what the nodes can
// do, the router can.
func (s *Server) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return controller.Capabilities(), nil
}

// owner finds the node that has the volume or snapshot with that ID. An ID tells
// the node that it was made on. If that one is gone, its disks may yet live in
// another: has is asked of all, and the one that says yes is it.
//
// It is pool.ErrNotFound if the ID cannot be one, or nobody has it; and
// pool.ErrUnavailable if a node that might have it does not answer.
func (s *Server) owner(ctx context.Context, id string, has func(context.Context, member) error) (member, error) {
	parsed, err := pool.ParseID(id)
	if err != nil {
		return member{}, err
	}
	members, err := s.fleet.list(ctx)
	if err != nil {
		return member{}, err
	}
	for _, m := range members {
		if m.Segment == parsed.Node {
			return m, nil
		}
	}
	var unanswered error
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) (struct{}, error) {
		return struct{}{}, has(ctx, m)
	}) {
		switch {
		case a.err == nil:
			return a.member, nil
		case !is(a.err, codes.NotFound):
			unanswered = pool.Errorf(pool.ErrUnavailable, "node %s, which made %s, is gone, and whether another has its disk is unknown: %w", parsed.Node, id, a.err)
		}
	}
	if unanswered != nil {
		return member{}, unanswered
	}
	return member{}, pool.Errorf(pool.ErrNotFound, "%s does not exist: node %s is gone, and no other has its disk", id, parsed.Node)
}

func (s *Server) volumeOwner(ctx context.Context, id string) (member, error) {
	return s.owner(ctx, id, func(ctx context.Context, m member) error {
		_, err := m.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
		return err
	})
}

func (s *Server) snapshotOwner(ctx context.Context, id string) (member, error) {
	return s.owner(ctx, id, func(ctx context.Context, m member) error {
		_, err := m.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
		return err
	})
}

// forward makes a call on the node that has a volume or snapshot.
func forward[Request, Response any](
	ctx context.Context, r Request, field, id string,
	owner func(context.Context, string) (member, error),
	call func(csi.ControllerClient, context.Context, Request, ...grpc.CallOption) (Response, error),
) (Response, error) {
	var none Response
	if err := request.Required(field, id); err != nil {
		return none, err
	}
	m, err := owner(ctx, id)
	if err != nil {
		return none, err
	}
	response, err := call(m.ControllerClient, ctx, r)
	return response, at(m, err)
}

// ControllerExpandVolume implements csi.ControllerServer.
func (s *Server) ControllerExpandVolume(ctx context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	return forward(ctx, r, "volume_id", r.GetVolumeId(), s.volumeOwner, csi.ControllerClient.ControllerExpandVolume)
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (s *Server) ValidateVolumeCapabilities(ctx context.Context, r *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	return forward(ctx, r, "volume_id", r.GetVolumeId(), s.volumeOwner, csi.ControllerClient.ValidateVolumeCapabilities)
}

// ControllerGetVolume implements csi.ControllerServer.
func (s *Server) ControllerGetVolume(ctx context.Context, r *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	return forward(ctx, r, "volume_id", r.GetVolumeId(), s.volumeOwner, csi.ControllerClient.ControllerGetVolume)
}

// ControllerGetVolumeHealth implements csi.ControllerServer.
func (s *Server) ControllerGetVolumeHealth(ctx context.Context, r *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	return forward(ctx, r, "volume_id", r.GetVolumeId(), s.volumeOwner, csi.ControllerClient.ControllerGetVolumeHealth)
}

// GetSnapshot implements csi.ControllerServer.
func (s *Server) GetSnapshot(ctx context.Context, r *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	return forward(ctx, r, "snapshot_id", r.GetSnapshotId(), s.snapshotOwner, csi.ControllerClient.GetSnapshot)
}
