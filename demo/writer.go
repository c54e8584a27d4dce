package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// recordSize is the length of a record: 16 digits, a blank, 46 hexadecimal
// digits of a checksum, a line feed.
const recordSize = 64

// record is the nth record of a run, from 1 on. Each run has its key, so that
// no byte of another run, or of another place, can pass for one.
func record(key string, n int64) []byte {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", key, n))
	return fmt.Appendf(nil, "%016d %s\n", n, hex.EncodeToString(sum[:23]))
}

// warmUp is how many records the writer is let write before something is shown
// on its volume, and after.
const warmUp = 50

// writer is a program that uses a volume, as a database does: it appends a
// record to a file and calls fsync, one after the other, and knows which
// records are on disk.
type writer struct {
	key     string
	file    *os.File
	begun   atomic.Int64 // records that it began to write
	durable atomic.Int64 // records whose fsync has returned
	quit    atomic.Bool
	done    chan struct{} // closed when it has ended

	mu    sync.Mutex
	waits []time.Duration // for a record to be on disk, since the last call of pauses
	err   error
}

func startWriter(path string) (*writer, error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	w := &writer{key: fmt.Sprint(os.Getpid(), time.Now().UnixNano()), file: file, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for ok := true; ok && !w.quit.Load(); {
			ok = w.append()
		}
	}()
	return w, nil
}

// append writes the next record.
func (w *writer) append() bool {
	n := w.begun.Add(1)
	start := time.Now()
	_, err := w.file.Write(record(w.key, n))
	if err == nil {
		err = w.file.Sync()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.err = fmt.Errorf("the writer, at record %d: %w", n, err)
		return false
	}
	w.waits = append(w.waits, time.Since(start))
	w.durable.Store(n)
	return true
}

// failure is why the writer ended before it was told to, or nil.
func (w *writer) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// advance waits until n more records are on disk.
func (w *writer) advance(ctx context.Context, n int64) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for goal := w.durable.Load() + n; w.durable.Load() < goal; {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the writer does not get %d records to the disk: %w", n, ctx.Err())
		case <-w.done:
			return errors.Join(errors.New("the writer has ended"), w.failure())
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// pauses tells how long a record has taken since the last call: the longest,
// and the median.
func (w *writer) pauses() (longest, usual time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waits) == 0 {
		return 0, 0
	}
	slices.Sort(w.waits)
	longest, usual = w.waits[len(w.waits)-1], w.waits[len(w.waits)/2]
	w.waits = nil
	return longest, usual
}

// stop ends the writer and closes its file. It can be called again.
func (w *writer) stop() {
	w.quit.Store(true)
	<-w.done
	w.file.Close()
}

// readRecords checks a file of records, or a copy of it: they must be whole,
// from the first on, in order, and of that run. It tells how many there are.
func readRecords(path, key string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n := int64(0)
	for ; len(text) >= recordSize; text = text[recordSize:] {
		if n++; string(text[:recordSize]) != string(record(key, n)) {
			return 0, fmt.Errorf("%s: record %d is not as it was written: %.70q", path, n, text[:recordSize])
		}
	}
	if len(text) > 0 {
		return 0, fmt.Errorf("%s: record %d is cut off after %d bytes", path, n+1, len(text))
	}
	return n, nil
}

// cut is what the writer knew around a snapshot or clone of its volume.
type cut struct {
	before int64 // records on disk when it was asked for
	after  int64 // records begun when it was done
}

// during does something while the writer goes on. It tells what the writer knew
// before and after, and the longest that a record took it, up to the records
// that it wrote afterwards.
func (w *writer) during(ctx context.Context, do func() error) (c cut, longest time.Duration, err error) {
	w.pauses()
	c.before = w.durable.Load()
	err = do()
	c.after = w.begun.Load()
	if err == nil {
		err = w.advance(ctx, warmUp)
	}
	longest, _ = w.pauses()
	return c, longest, err
}

// holds checks the number of records in a copy: what was on disk before the cut
// must be there, and what was begun after it must not.
func (c cut) holds(n int64) error {
	switch {
	case n < c.before:
		return fmt.Errorf("only %d records are there, and %d were on disk before it was asked for", n, c.before)
	case n > c.after:
		return fmt.Errorf("%d records are there, and only %d had been begun when it was done", n, c.after)
	default:
		return nil
	}
}
