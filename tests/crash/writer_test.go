//go:build integration

package crash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// A writer's place in a file or device is a ring of slots, each with one record:
// the number of the record, again and again.
const (
	recordSize = 4096
	slots      = 256
)

// write starts a writer at an offset of a file or device, behind the record
// that is the last there; it ends with the test at the latest.
func write(t testing.TB, name string, offset, last int64) *harness.Recorder {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w := harness.NewRecorder(last)
	record := make([]byte, recordSize)
	w.Start(2*time.Millisecond, func(n int64) error {
		fill(record, n)
		began := time.Now()
		if _, err := f.WriteAt(record, offset+n%slots*recordSize); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		w.Wrote(n, began)
		return nil
	}, f.Close)
	t.Cleanup(func() {
		_, _ = filesystem.Thaw(filepath.Dir(name)) // what a failed test has left frozen would hold the end up
		_ = w.End()
	})
	return w
}

func fill(record []byte, n int64) {
	for i := 0; i < len(record); i += 8 {
		binary.LittleEndian.PutUint64(record[i:], uint64(n))
	}
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
