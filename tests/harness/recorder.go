package harness

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Recorder writes one record after the other, as a database does to its log.
type Recorder struct {
	Safe    atomic.Int64 // the last record that must be there: the kernel has said so
	Longest atomic.Int64 // the most that one took, in nanoseconds

	stop chan struct{}
	done chan struct{}
	once sync.Once
	err  error // to be read after done
}

// NewRecorder makes a recorder whose last record is known.
func NewRecorder(last int64) *Recorder {
	w := &Recorder{stop: make(chan struct{}), done: make(chan struct{})}
	w.Safe.Store(last)
	return w
}

// Start lets it write, with a rest before each record so that the machine has time
// for others. put writes a record, brings it to stable storage, and says so with
// Wrote; finish is called at the end.
func (w *Recorder) Start(rest time.Duration, put func(n int64) error, finish func() error) {
	go func() {
		defer close(w.done)
		w.err = errors.Join(w.run(rest, put), finish())
	}()
}

func (w *Recorder) run(rest time.Duration, put func(n int64) error) error {
	for n := w.Safe.Load() + 1; ; n++ {
		select {
		case <-w.stop:
			return nil
		case <-time.After(rest):
		}
		if err := put(n); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
	}
}

// Wrote notes that a record is on stable storage, and since when it was being
// written.
func (w *Recorder) Wrote(n int64, began time.Time) {
	w.Longest.Store(max(w.Longest.Load(), int64(time.Since(began))))
	w.Safe.Store(n)
}

// End stops the writer and gives the error that it has met.
func (w *Recorder) End() error {
	w.once.Do(func() { close(w.stop) })
	<-w.done
	return w.err
}

// Progress waits until the writer has brought one more record to stable storage.
func (w *Recorder) Progress(limit time.Duration) error {
	seen := w.Safe.Load()
	for deadline := time.Now().Add(limit); w.Safe.Load() == seen; time.Sleep(time.Millisecond) {
		select {
		case <-w.done:
			return fmt.Errorf("the writer has ended: %w", w.err)
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the writer hangs at record %d for %s", seen, limit)
		}
	}
	return nil
}
