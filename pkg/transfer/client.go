package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math"
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

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errCorrupt is a piece that is not what its checksum says. What is on the disk
// there may be good, so that it is read again.
var errCorrupt = pool.Errorf(pool.ErrDamaged, "what was read does not have its checksum")

// Remote describes the snapshot that the copy's order names, as a volume can be
// made of it. done is to be called in the end.
func (c *Copy) Remote(ctx context.Context) (remote *pool.Remote, done func(), err error) {
	if c.copies.options.Dial == nil {
		return nil, nil, pool.Errorf(pool.ErrPrecondition, "the source is on %s, and this node has no connection to others: it needs --peer-address", c.from)
	}
	order := c.order
	connection, err := c.copies.options.Dial(order.GetNode(), order.GetAddress())
	if err != nil {
		return nil, nil, err
	}
	done = func() { _ = connection.Close() }
	client := peerapi.NewCopiesClient(connection)
	ending, end := context.WithCancel(ctx)
	defer end()
	description, _, err := open(ending, client, order, math.MaxInt64)
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

// open begins to read a snapshot.
func open(ctx context.Context, client peerapi.CopiesClient, order *peerapi.CopyOrder, offset int64) (*peerapi.Description, grpc.ServerStreamingClient[peerapi.ReadResponse], error) {
	stream, err := client.Read(ctx, &peerapi.ReadRequest{SnapshotId: order.GetSnapshotId(), Ticket: order.GetTicket(), Offset: offset}, grpc.CallContentSubtype(codecName))
	if err != nil {
		return nil, nil, fmt.Errorf("node %s: %w", order.GetNode(), err)
	}
	first, err := stream.Recv()
	if err != nil {
		return nil, nil, fmt.Errorf("node %s: %w", order.GetNode(), err)
	}
	if first.GetDescription() == nil {
		return nil, nil, fmt.Errorf("node %s: a copy must begin with a description", order.GetNode())
	}
	return first.GetDescription(), stream, nil
}

// read gives the pieces of a snapshot on another node. A connection that breaks,
// and a node that is restarted, are waited for: for as long as somebody asks for
// the volume.
func (c *Copy) read(ctx context.Context, client peerapi.CopiesClient, created, offset int64, yield func(pool.Piece, error) bool) {
	pause, corrupt := firstPause, 0
	for {
		c.mu.Lock()
		order := c.order
		c.mu.Unlock()
		at, wanted, err := c.stream(ctx, client, order, created, offset, yield)
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
	description, stream, err := open(ctx, client, order, offset)
	if err != nil {
		return offset, true, err
	}
	if description.GetCreated() != created {
		return offset, true, pool.Errorf(pool.ErrUnavailable, "snapshot %s on node %s is not the one any more that the copy began with: it begins anew with the next call", order.GetSnapshotId(), order.GetNode())
	}
	c.Advance(offset, description.GetSize())
	var response peerapi.ReadResponse // whose memory is used again
	for {
		err := stream.RecvMsg(&response)
		if errors.Is(err, io.EOF) {
			c.Advance(description.GetSize(), description.GetSize())
			return offset, true, nil
		}
		if err != nil {
			return offset, true, fmt.Errorf("node %s: %w", order.GetNode(), err)
		}
		piece := response.GetPiece()
		data := piece.GetData()
		if crc32.Checksum(data, castagnoli) != piece.GetChecksum() || piece.GetOffset() < offset || len(data) > pool.PieceSize {
			return offset, true, fmt.Errorf("node %s, snapshot %s, %d bytes at %d: %w", order.GetNode(), order.GetSnapshotId(), len(data), piece.GetOffset(), errCorrupt)
		}
		if err := c.copies.limiter.WaitN(ctx, len(data)); err != nil {
			return offset, true, err
		}
		if !yield(pool.Piece{Offset: piece.GetOffset(), Data: data}, nil) {
			return offset, false, nil
		}
		offset = piece.GetOffset() + int64(len(data))
		c.copies.received.Add(int64(len(data)))
		c.received.Add(int64(len(data)))
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
