package image

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"os"
	"sync"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// While one block of an image goes to the network or comes from it, the disk is
// at work on the others. These are a block's size in bytes, and how many there
// are: the memory that each end of a copy takes.
const (
	blockSize  = 1 << 20
	blockCount = 4
)

// block is some bytes of an image, in memory that direct I/O can use.
type block struct {
	offset int64
	data   []byte
	read   chan error // what came of reading it
}

// newBlocks makes the memory of one end. When none of it is used any more, it is
// to be released.
func newBlocks() (free chan []byte, release func(), err error) {
	memory, release, err := extent.Memory(blockCount, blockSize)
	if err != nil {
		return nil, nil, err
	}
	free = make(chan []byte, blockCount)
	for _, data := range memory {
		free <- data
	}
	return free, release, nil
}

// readAhead reads ranges of an image. The pieces that it gives are good until the
// next. The file must stay open until it returns.
func readAhead(ctx context.Context, file *os.File, ranges iter.Seq2[pool.Range, error]) iter.Seq2[pool.Piece, error] {
	return func(yield func(pool.Piece, error) bool) {
		direct, err := extent.OpenDirect(file, os.O_RDONLY)
		if err != nil {
			yield(pool.Piece{}, err)
			return
		}
		defer direct.Close()
		free, release, err := newBlocks()
		if err != nil {
			yield(pool.Piece{}, err)
			return
		}
		defer release()
		ctx, cancel := context.WithCancel(ctx)
		blocks := make(chan block, blockCount+1) // and an error
		defer func() {
			cancel()
			for b := range blocks { // until the other end has noticed
				<-b.read //nolint:errcheck // nobody wants it any more
			}
		}()
		go func() {
			defer close(blocks)
			failed := func(err error) {
				b := block{read: make(chan error, 1)}
				b.read <- err
				blocks <- b
			}
			for r, err := range ranges {
				if err != nil {
					failed(err)
					return
				}
				for end := r.Offset + r.Length; r.Offset < end; {
					select {
					case <-ctx.Done():
						failed(context.Cause(ctx))
						return
					case data := <-free:
						b := block{r.Offset, data[:min(blockSize, end-r.Offset)], make(chan error, 1)}
						go func() {
							_, err := direct.ReadAt(b.data, b.offset)
							b.read <- err
						}()
						blocks <- b
						r.Offset += int64(len(b.data))
					}
				}
			}
		}()
		for b := range blocks {
			if err := <-b.read; err != nil {
				yield(pool.Piece{}, err)
				return
			}
			for at := 0; at < len(b.data); at += pool.PieceSize {
				piece := b.data[at:min(at+pool.PieceSize, len(b.data))]
				if !yield(pool.Piece{Offset: b.offset + int64(at), Data: piece}, nil) {
					return
				}
			}
			free <- b.data[:blockSize]
		}
	}
}

// writeBehind writes to an image what is put into it, while the next arrives.
type writeBehind struct {
	direct  *extent.Direct
	free    chan []byte
	release func()
	next    block // what is being filled

	mu  sync.Mutex
	err error // the first
}

// newWriteBehind begins to write to a file. close must be called in the end.
func newWriteBehind(file *os.File) (*writeBehind, error) {
	direct, err := extent.OpenDirect(file, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	free, release, err := newBlocks()
	if err != nil {
		return nil, errors.Join(err, direct.Close())
	}
	return &writeBehind{direct: direct, free: free, release: release}, nil
}

func (w *writeBehind) write(b block) {
	if _, err := w.direct.WriteAt(b.data, b.offset); err != nil {
		w.mu.Lock()
		w.err = cmp.Or(w.err, err)
		w.mu.Unlock()
	}
	w.free <- b.data[:blockSize]
}

func (w *writeBehind) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// put takes some bytes. An error may be that of earlier ones.
func (w *writeBehind) put(p pool.Piece) error {
	for len(p.Data) > 0 {
		if n := len(w.next.data); n == blockSize || n > 0 && w.next.offset+int64(n) != p.Offset {
			w.flush()
		}
		if w.next.data == nil {
			w.next = block{offset: p.Offset, data: (<-w.free)[:0]}
		}
		n := min(blockSize-len(w.next.data), len(p.Data))
		w.next.data = append(w.next.data, p.Data[:n]...)
		p.Data, p.Offset = p.Data[n:], p.Offset+int64(n)
	}
	return w.failed()
}

func (w *writeBehind) flush() {
	if w.next.data != nil {
		go w.write(w.next)
		w.next = block{}
	}
}

// drain waits until all that was put is written. It is not on stable storage
// before the file is synced.
func (w *writeBehind) drain() error {
	w.flush()
	w.wait()
	return w.failed()
}

// wait waits for the writes that have begun.
func (w *writeBehind) wait() {
	all := make([][]byte, 0, blockCount)
	for range blockCount {
		all = append(all, <-w.free)
	}
	for _, data := range all {
		w.free <- data
	}
}

// close ends it. What was not drained may not be written.
func (w *writeBehind) close() {
	if w.next.data != nil {
		w.free <- w.next.data[:blockSize]
	}
	w.wait()
	w.release()
	_ = w.direct.Close() // the file's own close and sync tell
}
