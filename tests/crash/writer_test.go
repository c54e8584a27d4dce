//go:build integration

package crash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/filesystem"
)

// A writer's place in a file or device is a ring of slots, each with one record:
// the number of the record, again and again.
const (
	recordSize = 4096
	slots      = 256
)

// writer writes one record after the other, and brings each to stable storage
// before it begins the next.
type writer struct {
	safe    atomic.Int64 // records that the kernel has said are on stable storage
	longest atomic.Int64 // the most that one record took, in nanoseconds

	stop chan struct{}
	done chan struct{}
	once sync.Once
	err  error // to be read after done
}

// write starts a writer at an offset of a file or device, behind the record
// that is the last there; it ends with the test at the latest.
func write(t testing.TB, name string, offset, last int64) *writer {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{stop: make(chan struct{}), done: make(chan struct{})}
	w.safe.Store(last)
	go func() {
		defer close(w.done)
		w.err = errors.Join(w.run(f, offset, last+1), f.Close())
	}()
	t.Cleanup(func() {
		_, _ = filesystem.Thaw(filepath.Dir(name)) // what a failed test has left frozen would hold the end up
		_ = w.end()
	})
	return w
}

func (w *writer) run(f *os.File, offset, n int64) error {
	record := make([]byte, recordSize)
	for ; ; n++ {
		select {
		case <-w.stop:
			return nil
		case <-time.After(2 * time.Millisecond): // not to take the machine from the driver
		}
		fill(record, n)
		began := time.Now()
		if _, err := f.WriteAt(record, offset+n%slots*recordSize); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		w.safe.Store(n)
		w.longest.Store(max(w.longest.Load(), int64(time.Since(began))))
	}
}

func fill(record []byte, n int64) {
	for i := 0; i < len(record); i += 8 {
		binary.LittleEndian.PutUint64(record[i:], uint64(n))
	}
}

// progress waits until the writer has brought one more record to stable
// storage.
func (w *writer) progress(limit time.Duration) error {
	seen := w.safe.Load()
	for deadline := time.Now().Add(limit); w.safe.Load() == seen; time.Sleep(time.Millisecond) {
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

// end stops the writer and gives the error that it has met.
func (w *writer) end() error {
	w.once.Do(func() { close(w.stop) })
	<-w.done
	return w.err
}

// records checks what a writer has written, as it was at one instant: with some last
// record n, every slot has the newest record that belongs there, or none was
// due yet. It gives n.
func records(name string, offset int64) (last int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return 0, err
	}
	var found [slots]int64
	record, want := make([]byte, recordSize), make([]byte, recordSize)
	for slot := range found {
		if _, err := io.ReadFull(f, record); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, fmt.Errorf("slot %d: %w", slot, err)
		}
		n := int64(binary.LittleEndian.Uint64(record))
		if fill(want, n); string(record) != string(want) {
			return 0, fmt.Errorf("the record in slot %d is torn", slot)
		}
		found[slot] = n
		last = max(last, n)
	}
	for n := max(1, last-slots+1); n <= last; n++ {
		if found[n%slots] != n {
			return 0, fmt.Errorf("record %d is missing, though %d is there", n, last)
		}
	}
	return last, nil
}
