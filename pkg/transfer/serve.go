package transfer

import (
	"context"
	"errors"
	"hash/crc32"
	"math"

	"google.golang.org/grpc"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Server implements peerapi.CopiesServer for the pools of a node.
type Server struct {
	peerapi.UnimplementedCopiesServer

	pools *pool.Set
	used  *Copies
	allow func(ctx context.Context, ticket []byte, snapshotID string) error
}

// NewServer makes the service. allow judges whether the caller may read a
// snapshot with a ticket. What is read counts as of use in used.
func NewServer(pools *pool.Set, used *Copies, allow func(ctx context.Context, ticket []byte, snapshotID string) error) *Server {
	return &Server{pools: pools, used: used, allow: allow}
}

// Read implements peerapi.CopiesServer.
func (s *Server) Read(r *peerapi.ReadRequest, out grpc.ServerStreamingServer[peerapi.ReadResponse]) error {
	ctx := out.Context()
	if err := s.allow(ctx, r.GetTicket(), r.GetSnapshotId()); err != nil {
		return err
	}
	id, err := pool.ParseID(r.GetSnapshotId())
	if err != nil {
		return err
	}
	if r.GetOffset() < 0 {
		return pool.Errorf(pool.ErrInvalid, "offset %d is negative", r.GetOffset())
	}
	end, err := s.pools.BeginSnapshot(id.Name, pool.Copy)
	if err != nil {
		return err
	}
	defer end()
	engine, snapshot, err := s.pools.Snapshot(r.GetSnapshotId())
	if err != nil {
		return err
	}
	s.used.Use(snapshot.Name)
	defer s.used.Use(snapshot.Name)
	if err := out.Send(&peerapi.ReadResponse{Part: &peerapi.ReadResponse_Description{Description: &peerapi.Description{
		Size: snapshot.Size, Content: string(snapshot.Content), Created: snapshot.Created.UnixNano(),
	}}}); err != nil {
		return err
	}
	if r.GetOffset() == math.MaxInt64 { // only the description is wanted
		return nil
	}
	for piece, err := range engine.Read(ctx, snapshot.Name, r.GetOffset()) {
		if err != nil {
			return err
		}
		if err := out.Send(&peerapi.ReadResponse{Part: &peerapi.ReadResponse_Piece{Piece: &peerapi.Piece{
			Offset: piece.Offset, Data: piece.Data, Checksum: crc32.Checksum(piece.Data, castagnoli),
		}}}); err != nil {
			return errors.Join(err, ctx.Err())
		}
	}
	return nil
}
