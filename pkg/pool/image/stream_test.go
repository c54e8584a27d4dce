package image

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// imageOf makes a file of so many random bytes.
func imageOf(t *testing.T, size int) (*os.File, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	return f, data
}

func these(ranges ...pool.Range) iter.Seq2[pool.Range, error] {
	return func(yield func(pool.Range, error) bool) {
		for _, r := range ranges {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// The pieces of the ranges come in order, none larger than a piece may be, with
// the bytes of the file; and written again they make the same file.
func TestWhatIsReadAheadAndWrittenBehindIsTheSame(t *testing.T) {
	const size = 20<<20 + 777
	f, data := imageOf(t, size)
	ranges := []pool.Range{
		{Offset: 0, Length: 4096}, {Offset: 8192, Length: 9 << 20}, {Offset: 10 << 20, Length: 4096 + 100},
		{Offset: 11<<20 + 5, Length: 3<<20 + 1}, {Offset: 15 << 20, Length: size - 15<<20},
	}
	copied, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	w, err := newWriteBehind(copied)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	want := make([]byte, size)
	for _, r := range ranges {
		copy(want[r.Offset:r.Offset+r.Length], data[r.Offset:])
	}
	at, count := int64(0), 0
	for piece, err := range readAhead(t.Context(), f, these(ranges...)) {
		if err != nil {
			t.Fatal(err)
		}
		if piece.Offset < at || len(piece.Data) == 0 || len(piece.Data) > pool.PieceSize {
			t.Fatalf("%d bytes at %d come after what ends at %d", len(piece.Data), piece.Offset, at)
		}
		at = piece.Offset + int64(len(piece.Data))
		if err := w.put(piece); err != nil {
			t.Fatal(err)
		}
		if count++; count%7 == 0 {
			if err := w.drain(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, at)
			if _, err := copied.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:at]) {
				t.Fatalf("after a drain, what was put up to %d is not in the file (%v)", at, err)
			}
		}
	}
	if err := w.drain(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := copied.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs (%v)", err)
	}
}

// Reading ends when its context does, when an error comes with the ranges, when
// the file ends too early, and when nobody wants more; each without anything left
// behind (the race detector and the deadline of the test see to that).
func TestReadingAheadEnds(t *testing.T) {
	f, _ := imageOf(t, 8<<20)
	all := these(pool.Range{Offset: 0, Length: 8 << 20})
	broken := errors.New("broken")
	last := func(ctx context.Context, ranges iter.Seq2[pool.Range, error], each func(n int) bool) (n int, err error) {
		for _, err := range readAhead(ctx, f, ranges) {
			if err != nil {
				return n, err
			}
			if n++; !each(n) {
				break
			}
		}
		return n, nil
	}
	more := func(int) bool { return true }

	ctx, cancel := context.WithCancelCause(t.Context())
	if _, err := last(ctx, all, func(n int) bool {
		if n == 2 {
			cancel(broken)
		}
		return true
	}); !errors.Is(err, broken) {
		t.Errorf("after its context has ended: %v", err)
	}
	if n, err := last(t.Context(), all, func(n int) bool { return n < 3 }); n != 3 || err != nil {
		t.Errorf("when no more is wanted: %d pieces, %v", n, err)
	}
	if n, err := last(t.Context(), func(yield func(pool.Range, error) bool) {
		_ = yield(pool.Range{Length: 4096}, nil) && yield(pool.Range{}, broken)
	}, more); n != 1 || !errors.Is(err, broken) {
		t.Errorf("with an error after one range: %d pieces, %v", n, err)
	}
	if _, err := last(t.Context(), these(pool.Range{Offset: 7 << 20, Length: 2 << 20}), more); err == nil {
		t.Error("a file that is too short is no error")
	}
}

// A write that fails is told with what is put after it, or with the drain, and
// again with each later one; nothing waits for ever.
func TestAWriteThatFailsIsTold(t *testing.T) {
	f, data := imageOf(t, 4<<20)
	w, err := newWriteBehind(f)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	const tooFar = 1<<63 - 1<<20 - 4096 // EFBIG, or EINVAL, on every filesystem
	if err := w.put(pool.Piece{Offset: tooFar, Data: data[:4096]}); err != nil {
		t.Fatalf("it is told before it is written: %v", err)
	}
	if err := w.drain(); err == nil {
		t.Fatal("a write that failed is not told")
	}
	for range 3 * blockCount {
		if err := w.put(pool.Piece{Offset: 0, Data: data[:blockSize]}); err == nil {
			t.Fatal("a write after one that failed is good")
		}
	}
	if err := w.drain(); err == nil {
		t.Error("the second drain is good")
	}
}
