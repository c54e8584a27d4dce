package transfer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// The pauses between two tries to go on with a copy whose connection broke, and
// how often in a row a piece may come with a wrong checksum.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
	mostCorrupt  = 3
)

// leftover is how long what came before a call failed may take to be read.
const leftover = time.Second

// Remote describes the snapshot that the copy's order names, as a volume can be
// made of it. done is to be called in the end.
func (c *Copy) Remote(ctx context.Context) (remote *pool.Remote, done func(), err error) {
	if c.copies.options.Dial == nil {
		return nil, nil, pool.Errorf(pool.ErrPrecondition, "the source is on %s, and this node has no connection to others: it needs --peer-address", c.from)
	}
	order := c.latest()
	connection, err := c.copies.options.Dial(order.GetNode(), order.GetAddress())
	if err != nil {
		return nil, nil, err
	}
	done = func() { _ = connection.Close() }
	client := peerapi.NewCopiesClient(connection)
	ending, end := context.WithCancel(ctx)
	defer end()
	description, _, err := call(ending, client, order, &peerapi.ReadRequest{})
	if err != nil {
		done()
		return nil, nil, err
	}
	return &pool.Remote{
		Size:    description.GetSize(),
		Content: pool.Content(description.GetContent()),
		Created: description.GetCreated(),
		Read: func(ctx context.Context, offset int64) iter.Seq2[pool.Piece, error] {
			return func(yield func(pool.Piece, error) bool) { c.read(ctx, client, description.GetCreated(), offset, yield) }
		},
	}, done, nil
}

// call asks a node to read a snapshot, and gives what it answers first.
func call(ctx context.Context, client peerapi.CopiesClient, order *peerapi.CopyOrder, r *peerapi.ReadRequest) (*peerapi.Description, grpc.ServerStreamingClient[peerapi.Description], error) {
	r.SnapshotId, r.Ticket = order.GetSnapshotId(), order.GetTicket()
	stream, err := client.Read(ctx, r)
	if err != nil {
		return nil, nil, fmt.Errorf("node %s: %w", order.GetNode(), err)
	}
	description, err := stream.Recv()
	if err != nil {
		return nil, nil, fmt.Errorf("node %s: %w", order.GetNode(), err)
	}
	return description, stream, nil
}

// source is a snapshot on another node that is being read.
type source struct {
	description *peerapi.Description
	connection  net.Conn
	memory      []byte     // of the piece that was read last
	ended       chan error // how the call ended; io.EOF is well
}

// open begins to read a snapshot from an offset on, until ctx ends.
func (c *Copy) open(ctx context.Context, client peerapi.CopiesClient, order *peerapi.CopyOrder, offset int64) (*source, error) {
	connection, err := c.copies.options.Open(ctx, order.GetNode(), order.GetAddress())
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "node %s: opening a connection for the bytes: %v", order.GetNode(), err)
	}
	context.AfterFunc(ctx, func() { connection.Close() })
	name := make([]byte, nameSize)
	_, _ = rand.Read(name) // never fails
	if _, err := connection.Write(name); err != nil {
		return nil, status.Errorf(codes.Unavailable, "node %s: opening a connection for the bytes: %v", order.GetNode(), err)
	}
	description, stream, err := call(ctx, client, order, &peerapi.ReadRequest{Offset: offset, Connection: name})
	if err != nil {
		return nil, err
	}
	s := &source{description, connection, make([]byte, pool.PieceSize), make(chan error, 1)}
	go func() {
		_, err := stream.Recv()
		if err == nil {
			err = status.Error(codes.Internal, "a second description")
		}
		s.ended <- err
		if !errors.Is(err, io.EOF) {
			// Nobody would notice any more if nothing came. What has come is good.
			_ = connection.SetReadDeadline(time.Now().Add(leftover))
		}
	}()
	return s, nil
}

// next gives the next piece, which must lie behind an offset. It is good until
// the one after it. When everything was given, it is io.EOF.
func (s *source) next(behind int64) (pool.Piece, error) {
	piece, err := readPiece(s.connection, behind, s.memory)
	if err == nil || errors.Is(err, errCorrupt) {
		return piece, err
	}
	s.connection.Close()
	// The call tells why, and whether the end is the end.
	select {
	case ended := <-s.ended:
		if errors.Is(ended, io.EOF) && !errors.Is(err, io.EOF) {
			break
		}
		return piece, ended
	case <-time.After(patience):
	}
	return piece, status.Errorf(codes.Unavailable, "the connection for the bytes: %v", err)
}

// read gives the pieces of a snapshot on another node. A connection that breaks,
// and a node that is restarted, are waited for: for as long as somebody asks for
// the volume.
func (c *Copy) read(ctx context.Context, client peerapi.CopiesClient, created, offset int64, yield func(pool.Piece, error) bool) {
	pause, corrupt := firstPause, 0
	for {
		at, wanted, err := c.stream(ctx, client, c.latest(), created, offset, yield)
		if err == nil || !wanted {
			return
		}
		if at > offset {
			offset, pause, corrupt = at, firstPause, 0
		}
		if errors.Is(err, errCorrupt) {
			corrupt++
		}
		if ctx.Err() != nil {
			yield(pool.Piece{}, context.Cause(ctx))
			return
		}
		if corrupt >= mostCorrupt || !mayPass(err) {
			yield(pool.Piece{}, err)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
			pause = min(2*pause, longestPause)
		}
	}
}

// stream gives the pieces that one stream brings, and tells how far it came.
func (c *Copy) stream(ctx context.Context, client peerapi.CopiesClient, order *peerapi.CopyOrder, created, offset int64, yield func(pool.Piece, error) bool) (at int64, wanted bool, err error) {
	ctx, end := context.WithCancel(ctx)
	defer end()
	from, err := c.open(ctx, client, order, offset)
	if err != nil {
		return offset, true, err
	}
	size := from.description.GetSize()
	if from.description.GetCreated() != created {
		return offset, true, pool.Errorf(pool.ErrUnavailable, "snapshot %s on node %s is not the one any more that the copy began with: it begins anew with the next call", order.GetSnapshotId(), order.GetNode())
	}
	c.Advance(offset, size)
	for {
		piece, err := from.next(offset)
		if errors.Is(err, io.EOF) {
			c.Advance(size, size)
			return offset, true, nil
		}
		if err != nil {
			return offset, true, fmt.Errorf("node %s, snapshot %s: %w", order.GetNode(), order.GetSnapshotId(), err)
		}
		n := len(piece.Data)
		if err := c.copies.limiter.WaitN(ctx, n); err != nil {
			return offset, true, err
		}
		if !yield(piece, nil) {
			return offset, false, nil
		}
		offset = piece.Offset + int64(n)
		c.copies.received.Add(int64(n))
		c.received.Add(int64(n))
		c.done.Store(offset)
	}
}

// mayPass reports whether a copy can go on by itself after an error, when the
// connection or the node is back. After another error, too, the next call for the
// volume goes on where this one ended.
func mayPass(err error) bool {
	if errors.Is(err, errCorrupt) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted:
		return true
	default:
		return false
	}
}
