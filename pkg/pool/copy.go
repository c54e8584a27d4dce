package pool

import (
	"context"
	"iter"
)

// Remote is a snapshot in another pool, of this node or of another, that a
// volume is made of.
type Remote struct {
	Size    int64   // bytes
	Content Content // of the volume when it was cut
	Created int64   // when it was cut, nanoseconds since 1970 UTC: with the source, its identity
	// Read gives what the snapshot has from an offset on, in ascending order;
	// what it does not give reads as zeros. A piece is good until the next.
	Read func(ctx context.Context, offset int64) iter.Seq2[Piece, error]
}

// Piece is some bytes of a volume or snapshot.
type Piece struct {
	Offset int64
	Data   []byte
}

// PieceSize is how many bytes a piece has at most: what a copy in flight needs of
// memory is a few of them.
const PieceSize = 128 << 10
