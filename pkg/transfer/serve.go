package transfer

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Server implements peerapi.CopiesServer for the pools of a node.
type Server struct {
	peerapi.UnimplementedCopiesServer

	pools       *pool.Set
	used        *Copies
	connections *Connections
	allow       Allow
}

// Allow judges whether the caller may read a snapshot with a ticket, and tells
// which node it is, by its topology segment.
type Allow func(ctx context.Context, ticket []byte, snapshotID string) (reader string, err error)

// NewServer makes the service, which gives bytes over those connections. What is
// read counts as of use in used.
func NewServer(pools *pool.Set, used *Copies, connections *Connections, allow Allow) *Server {
	return &Server{pools: pools, used: used, connections: connections, allow: allow}
}

// Read implements peerapi.CopiesServer.
func (s *Server) Read(r *peerapi.ReadRequest, out grpc.ServerStreamingServer[peerapi.Description]) error {
	ctx := out.Context()
	reader, err := s.allow(ctx, r.GetTicket(), r.GetSnapshotId())
	if err != nil {
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
	if err := out.Send(&peerapi.Description{
		Size: snapshot.Size, Content: string(snapshot.Content), Created: snapshot.Created.UnixNano(),
	}); err != nil {
		return err
	}
	if len(r.GetConnection()) == 0 {
		return nil
	}
	connection, err := s.connections.take(ctx, reader, r.GetConnection())
	if err != nil {
		return err
	}
	defer connection.Close()
	// Writing to it would wait for a reader that is there no more.
	defer context.AfterFunc(ctx, func() { connection.Close() })()
	for piece, err := range engine.Read(ctx, snapshot.Name, r.GetOffset()) {
		if err != nil {
			return err
		}
		if err := writePiece(connection, piece); err != nil {
			return broken(ctx, err)
		}
	}
	if err := writePiece(connection, pool.Piece{}); err != nil {
		return broken(ctx, err)
	}
	// Until all has come over, the call is what notices that the reader is gone.
	if _, err := io.Copy(io.Discard, connection); err != nil {
		return broken(ctx, err)
	}
	return nil
}

// broken is the error of a connection for bytes.
func broken(ctx context.Context, err error) error {
	return errors.Join(pool.Errorf(pool.ErrUnavailable, "the connection for the bytes: %w", err), ctx.Err())
}
