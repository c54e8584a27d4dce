package extent

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sector is what offset, length and memory must be multiples of to go past the
// page cache, in bytes: of all disks that there are, the largest logical block.
const Sector = 4096

// Aligned makes room for n bytes that begins at a multiple of [Sector].
func Aligned(n int) []byte {
	b := make([]byte, n+Sector-1)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (Sector - 1)
	return b[skip : skip+n : skip+n]
}

// Direct reads and writes a file past the page cache (O_DIRECT in open(2)): bytes
// that nobody here will want again do not push others out of memory, and those of
// a process in a memory cgroup do not wait there for the disk. What is not
// aligned, and all of it on a filesystem that cannot do so, goes through the page
// cache. The kernel keeps both ways equal.
type Direct struct {
	cached *os.File
	direct *os.File // nil if the filesystem has no such way
}

// OpenDirect opens a file that is open a second time. flag is os.O_RDONLY or
// os.O_RDWR. f is still wanted and must stay open.
func OpenDirect(f *os.File, flag int) (*Direct, error) {
	direct, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flag|unix.O_DIRECT, 0)
	switch {
	case errors.Is(err, unix.EINVAL):
		return &Direct{cached: f}, nil
	case err != nil:
		return nil, fmt.Errorf("open %s for direct I/O: %w", f.Name(), err)
	}
	return &Direct{cached: f, direct: direct}, nil
}

// Close closes what OpenDirect opened.
func (d *Direct) Close() error {
	if d.direct == nil {
		return nil
	}
	return d.direct.Close()
}

// ReadAt implements [io.ReaderAt].
func (d *Direct) ReadAt(b []byte, off int64) (int, error) {
	if d.fits(b, off) {
		n, err := d.direct.ReadAt(b, off)
		if !errors.Is(err, unix.EINVAL) {
			return n, err
		}
	}
	return d.cached.ReadAt(b, off)
}

// WriteAt implements [io.WriterAt]. Nothing is on stable storage before the file
// is synced.
func (d *Direct) WriteAt(b []byte, off int64) (int, error) {
	if d.fits(b, off) {
		n, err := d.direct.WriteAt(b, off)
		if !errors.Is(err, unix.EINVAL) {
			return n, err
		}
	}
	return d.cached.WriteAt(b, off)
}

func (d *Direct) fits(b []byte, off int64) bool {
	at := int64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	return d.direct != nil && (at|off|int64(len(b)))%Sector == 0
}
