//go:build integration

package chaos

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/orlop-csi/orlop/tests/chaos/model"
	"github.com/orlop-csi/orlop/tests/harness"
)

// A volume's records are in a ring of slots: record n, which is numbered from 1
// on, in slot n modulo their number. They are at the beginning of a device, or in
// a file. Fills are in files, or behind them on the device.
const (
	recordSize = 4096 // bytes
	slots      = 256
	fillPlace  = 4 << 20 // bytes, of the first
	fillSpace  = 2 << 20 // bytes, for each
)

// clock orders what all writers do: a record has the time when it was begun, and
// its writer remembers the time when it was on stable storage.
var clock atomic.Int64

// writer appends records to a volume that is published, and brings each to stable
// storage before it begins the next.
type writer struct {
	*harness.Recorder

	number uint64
	volume int          // number of the operation that made its volume
	first  int64        // its first record's number
	begun  atomic.Int64 // the last that may be in the volume

	pause sync.Mutex  // held while it must not write
	held  atomic.Bool // for a snapshot of a group

	mu   sync.Mutex
	ends []int64 // when each of its records was on stable storage
}

// openLog opens what a writer writes to. It waits while the filesystem is frozen,
// and that may be until a driver that was killed is started again.
func openLog(target string, kind model.Kind) (*os.File, error) {
	return os.OpenFile(logOf(target, kind), os.O_WRONLY|os.O_CREATE, 0o600)
}

// write starts a writer on a published volume, behind the last record, which is
// known.
func write(f *os.File, v model.Volume, number uint64) *writer {
	last := v.Content.Last.Least
	w := &writer{Recorder: harness.NewRecorder(last), number: number, volume: v.Born, first: last + 1}
	w.begun.Store(last)
	record := make([]byte, recordSize)
	w.Start(3*time.Millisecond, func(n int64) error { return w.one(f, record, n) }, f.Close)
	return w
}

func (w *writer) one(f *os.File, record []byte, n int64) error {
	w.pause.Lock()
	defer w.pause.Unlock()
	fill(record, n, w.number, clock.Add(1))
	began := time.Now()
	w.begun.Store(n)
	if _, err := f.WriteAt(record, n%slots*recordSize); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	end := clock.Add(1)
	w.mu.Lock()
	w.ends = append(w.ends, end)
	w.mu.Unlock()
	w.Wrote(n, began)
	return nil
}

// endedBefore tells the last of its records that was on stable storage before a
// time of the clock.
func (w *writer) endedBefore(at int64) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, end := range slices.Backward(w.ends) {
		if end < at {
			return w.first + int64(i)
		}
	}
	return w.first - 1
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fill makes a record: its number, its writer, when it was begun, bytes that
// follow from these, and a checksum.
func fill(record []byte, n int64, writer uint64, begun int64) {
	binary.LittleEndian.PutUint64(record, uint64(n))
	binary.LittleEndian.PutUint64(record[8:], writer)
	binary.LittleEndian.PutUint64(record[16:], uint64(begun))
	binary.LittleEndian.PutUint64(record[24:], uint64(n)*0x9e3779b97f4a7c15^writer)
	for i := 32; i < recordSize; i *= 2 {
		copy(record[i:], record[:i])
	}
	binary.LittleEndian.PutUint32(record[recordSize-4:], crc32.Checksum(record[:recordSize-4], castagnoli))
}

// logOf is where the records of a published volume are, and fillOf where its i-th
// fill is.
func logOf(target string, kind model.Kind) string {
	if kind == model.Block {
		return target
	}
	return filepath.Join(target, "log")
}

func fillOf(target string, kind model.Kind, i int) (file string, offset int64) {
	if kind == model.Block {
		return target, fillPlace + int64(i)*fillSpace
	}
	return filepath.Join(target, fmt.Sprintf("fill-%d", i)), 0
}

// rows is what was found of the records of a volume.
type rows struct {
	last  int64 // number of the last
	begun int64 // when that was begun
}

// read reads the records of a published volume, and checks that they are an
// unbroken row: with some last record n, every slot has the newest that belongs
// there, of the writer whose it is, or none was due yet.
func read(target string, kind model.Kind, content model.Content) (rows, error) {
	f, err := os.Open(logOf(target, kind))
	if errors.Is(err, fs.ErrNotExist) {
		return rows{}, nil
	}
	if err != nil {
		return rows{}, err
	}
	defer f.Close()
	ring := make([]byte, slots*recordSize)
	n, err := io.ReadFull(f, ring)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return rows{}, err
	}
	ring = ring[:n]
	var r rows
	var found [slots]int64
	want, zeros := make([]byte, recordSize), make([]byte, recordSize)
	for slot := 0; (slot+1)*recordSize <= len(ring); slot++ {
		record := ring[slot*recordSize:][:recordSize]
		if bytes.Equal(record, zeros) {
			continue
		}
		n, writer := int64(binary.LittleEndian.Uint64(record)), binary.LittleEndian.Uint64(record[8:])
		begun := int64(binary.LittleEndian.Uint64(record[16:]))
		if fill(want, n, writer, begun); !bytes.Equal(record, want) {
			return r, fmt.Errorf("the record in slot %d is torn", slot)
		}
		if n%slots != int64(slot) {
			return r, fmt.Errorf("slot %d has record %d", slot, n)
		}
		if whose := content.Writer(n); writer != whose {
			return r, fmt.Errorf("record %d is of writer %d, and must be of writer %d", n, writer, whose)
		}
		found[slot] = n
		if n > r.last {
			r.last, r.begun = n, begun
		}
	}
	if len(ring)%recordSize != 0 {
		return r, fmt.Errorf("the records end after %d bytes", len(ring))
	}
	for n := max(1, r.last-slots+1); n <= r.last; n++ {
		if found[n%slots] != n {
			return r, fmt.Errorf("record %d is missing, though %d is there", n, r.last)
		}
	}
	return r, nil
}

// noise gives the bytes of a fill.
func noise(f model.Fill) []byte {
	data := make([]byte, f.Size)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], f.Seed)
	_, _ = rand.NewChaCha8(seed).Read(data)
	return data
}

// putFill writes a fill and brings it to stable storage.
func putFill(target string, kind model.Kind, i int, fill model.Fill) error {
	name, offset := fillOf(target, kind, i)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(noise(fill), offset); err != nil {
		return err
	}
	if err := f.Sync(); err != nil || kind == model.Block {
		return err
	}
	dir, err := os.Open(target)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// checkFills compares the fills of a published volume with what they must be, and
// gives how many bytes they have.
func checkFills(target string, kind model.Kind, content model.Content) (size int64, err error) {
	for i, fill := range content.Fills {
		name, offset := fillOf(target, kind, i)
		f, err := os.Open(name)
		if err != nil {
			return size, err
		}
		got := make([]byte, fill.Size)
		_, err = f.ReadAt(got, offset)
		f.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			return size, err
		}
		if !bytes.Equal(got, noise(fill)) {
			return size, fmt.Errorf("%s is not what was written", name)
		}
		size += fill.Size
	}
	if kind == model.Block {
		return size, nil
	}
	surplus, _ := fillOf(target, kind, len(content.Fills))
	if _, err := os.Lstat(surplus); err == nil {
		return size, fmt.Errorf("%s is there, and nobody has written it", surplus)
	}
	return size, nil
}
