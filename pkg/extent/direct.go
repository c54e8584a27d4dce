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

// hugePage is the size of a huge page, in bytes, where pages have 4 KiB.
const hugePage = 2 << 20

// Memory makes room for so many parts of a size in bytes, a multiple of [Sector],
// that direct I/O can use. It asks for huge pages (MADV_HUGEPAGE in madvise(2)):
// the kernel takes hold of what it reads into and writes from page by page, in
// every layer down to the disk, which on small pages is a quarter of the time that
// a copy takes. After free nothing may touch it.
func Memory(parts, size int) (memory [][]byte, free func(), err error) {
	all, err := unix.Mmap(-1, 0, parts*size+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, nil, fmt.Errorf("mmap of %d bytes: %w", parts*size, err)
	}
	_ = unix.Madvise(all, unix.MADV_HUGEPAGE) // a kernel without them is as good, and slower
	at := -int(uintptr(unsafe.Pointer(unsafe.SliceData(all)))) & (hugePage - 1)
	for range parts {
		memory = append(memory, all[at:at+size:at+size])
		at += size
	}
	return memory, func() { _ = unix.Munmap(all) }, nil // it fails for what is no mapping
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
