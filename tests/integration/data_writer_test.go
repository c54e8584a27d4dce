//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A record has its number, bytes that follow from it, and their checksum.
const (
	dataRecordSize  = 4096 // bytes
	dataMostRecords = 8192 // after which a writer rests, so that it fits any volume
)

// dataWriter does to a volume what a database does to its log: it appends
// records, and brings each to stable storage before it begins the next. Beside
// that it makes, renames and removes files, so that the filesystem is never at
// rest.
type dataWriter struct {
	begun   atomic.Int64 // records that may be in the volume
	safe    atomic.Int64 // records that must be: the kernel has said so
	longest atomic.Int64 // the most that one record took, in nanoseconds

	stop chan struct{}
	once sync.Once
	work sync.WaitGroup
	mu   sync.Mutex
	err  error
}

// dataSync says how a record gets to stable storage.
type dataSync int

const (
	dataFsync  dataSync = iota // written to the page cache, then fsync(2)
	dataDirect                 // O_DIRECT: with write(2) it is on the device
)

// dataWrite starts a writer on a file or device. churn is a directory for the
// other files, or empty. The writer is stopped at the end of the test at the
// latest.
func dataWrite(t testing.TB, name, churn string, how dataSync) *dataWriter {
	t.Helper()
	flag := os.O_WRONLY | os.O_CREATE
	if how == dataDirect {
		flag |= unix.O_DIRECT
	}
	f, err := os.OpenFile(name, flag, 0o600)
	dataMust(t, err)
	w := &dataWriter{stop: make(chan struct{})}
	w.work.Go(func() {
		defer f.Close()
		w.fail(w.append(f, how))
	})
	if churn != "" {
		dataMust(t, os.MkdirAll(churn, 0o700))
		w.work.Go(func() { w.fail(w.churn(churn)) })
	}
	t.Cleanup(func() { _ = w.end() })
	return w
}

func (w *dataWriter) append(f *os.File, how dataSync) error {
	record, err := unix.Mmap(-1, 0, dataRecordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err // its memory is aligned, as O_DIRECT wants it
	}
	defer unix.Munmap(record) //nolint:errcheck // memory
	for n := int64(0); !w.stopped() && n < dataMostRecords; n++ {
		dataRecord(record, n)
		began := time.Now()
		w.begun.Store(n + 1)
		if _, err := f.WriteAt(record, n*dataRecordSize); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		if how == dataFsync {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("record %d: %w", n, err)
			}
		}
		w.safe.Store(n + 1)
		w.longest.Store(max(w.longest.Load(), int64(time.Since(began))))
		time.Sleep(time.Millisecond) // the machine has others to serve
	}
	return nil
}

func (w *dataWriter) churn(dir string) error {
	content := make([]byte, 64<<10)
	for n := 0; !w.stopped(); n++ {
		fresh, final := filepath.Join(dir, "fresh"), filepath.Join(dir, fmt.Sprint(n%32))
		if err := os.WriteFile(fresh, content[:1+n*7919%len(content)], 0o600); err != nil {
			return err
		}
		if err := os.Rename(fresh, final); err != nil {
			return err
		}
		if n%3 == 0 {
			if err := os.Remove(final); err != nil {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

func (w *dataWriter) stopped() bool {
	select {
	case <-w.stop:
		return true
	default:
		return false
	}
}

func (w *dataWriter) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

// check gives the first error that the writer has met.
func (w *dataWriter) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// end stops the writer and gives the first error that it has met.
func (w *dataWriter) end() error {
	w.once.Do(func() { close(w.stop) })
	w.work.Wait()
	return w.check()
}

// mustEnd stops the writer, fails the test if it has met an error, and gives
// the number of records.
func (w *dataWriter) mustEnd(t testing.TB) int64 {
	t.Helper()
	if err := w.end(); err != nil {
		t.Fatalf("the writer saw an error: %v", err)
	}
	return w.safe.Load()
}

// progress waits until the writer has brought n more records to stable storage,
// or has written them all.
func (w *dataWriter) progress(t testing.TB, n int64) {
	t.Helper()
	goal := min(w.safe.Load()+n, dataMostRecords)
	dataEventually(t, func() error {
		if err := w.check(); err != nil {
			t.Fatalf("the writer saw an error: %v", err)
		}
		if w.safe.Load() < goal {
			return fmt.Errorf("the writer hangs at record %d", w.safe.Load())
		}
		return nil
	})
}

// dataRecord fills a record. It is fast, because with the race detector all else
// is slow.
func dataRecord(record []byte, n int64) {
	binary.LittleEndian.PutUint64(record, uint64(n))
	binary.LittleEndian.PutUint64(record[8:], uint64(n)*0x9e3779b97f4a7c15|1) // not zeros
	for i := 16; i < dataRecordSize; i *= 2 {
		copy(record[i:], record[:i])
	}
	binary.LittleEndian.PutUint32(record[dataRecordSize-4:], crc32.ChecksumIEEE(record[:dataRecordSize-4]))
}

// dataRecords reads what a writer has written, and fails the test unless it is
// an unbroken sequence of whole records: after the first that is not there, a
// device is zero, and a file ends. It gives their number.
func dataRecords(t testing.TB, name string) int64 {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	buffered := bufio.NewReaderSize(f, 1<<20)
	got, want, zeros := make([]byte, dataRecordSize), make([]byte, dataRecordSize), make([]byte, dataRecordSize)
	for n := int64(0); ; n++ {
		_, err := io.ReadFull(buffered, got)
		if err == io.EOF {
			return n
		}
		if err != nil {
			t.Fatalf("%s ends within record %d: %v", name, n, err)
		}
		dataRecord(want, n)
		if bytes.Equal(got, want) {
			continue
		}
		if !bytes.Equal(got, zeros) {
			t.Fatalf("record %d of %s is torn", n, name)
		}
		if info, err := f.Stat(); err != nil || info.Mode().IsRegular() {
			t.Fatalf("record %d of %s is zeros (%v)", n, name, err)
		}
		dataMustBeZero(t, name, n*dataRecordSize)
		return n
	}
}
