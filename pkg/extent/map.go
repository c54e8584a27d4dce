package extent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Extent is a run of a file's bytes that are of one kind and, if they have a
// place in the filesystem, lie there side by side.
type Extent struct {
	Offset, Length int64 // in the file, bytes
	State          State
	Physical       int64 // where a Located one begins in the filesystem, bytes
}

func (e Extent) end() int64 { return e.Offset + e.Length }

// State says what a filesystem tells of an extent.
type State uint8

// The states of an extent. A hole is no extent at all, and reads as zeros.
const (
	Located  State = iota // written, and the filesystem tells where
	Reserved              // has a place and was never written: it reads as zeros
	Opaque                // written, and its place says nothing of its bytes
)

// Source gives the extents of a file in the order of their offsets, a batch at
// a time. An error is the last that it gives.
type Source = iter.Seq2[[]Extent, error]

// Map gives the extents of f in [from, to), cut to that, as the filesystem keeps
// them, which is FIEMAP (Documentation/filesystems/fiemap.rst of the kernel). It
// reads nothing of what is in them. It brings f to stable storage first, and
// nobody may write to f until the end. Of a filesystem that has no FIEMAP, or
// tells of no places, it is ErrUnsupported.
//
// Two maps are best read in turns: XFS looks each extent up in a tree for which
// both would wait, and to wait and wake costs far more than the look-up.
func Map(ctx context.Context, f *os.File, from, to int64) Source {
	return func(yield func([]Extent, error) bool) {
		m := fiemap{f: f, at: from, to: to, flags: flagSync}
		for !m.ended {
			extents, err := m.next(ctx)
			if err != nil {
				err = fmt.Errorf("map the extents of %s: %w", f.Name(), err)
			}
			if !yield(extents, err) || err != nil {
				return
			}
		}
	}
}

// fiemap is how far a file has been mapped.
type fiemap struct {
	f      *os.File
	at, to int64
	flags  uint32
	ended  bool // for whatever reason
}

// next asks for the next extents. There may be none left.
func (m *fiemap) next(ctx context.Context) (extents []Extent, err error) {
	defer func() { m.ended = m.ended || err != nil }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if m.at >= m.to {
		m.ended = true
		return nil, nil
	}
	from := m.at
	request := fiemapRequest{start: uint64(from), length: uint64(m.to - from), flags: m.flags, room: fiemapBatch}
	if err := ioctl(m.f, fsIocFiemap, unsafe.Pointer(&request)); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EBADR) {
			err = fmt.Errorf("%w (%w)", ErrUnsupported, err)
		}
		return nil, err
	}
	m.flags = 0 // it is synced
	found := request.extents[:min(request.mapped, fiemapBatch)]
	m.ended = len(found) == 0
	extents = make([]Extent, 0, len(found))
	for _, e := range found {
		m.ended = m.ended || e.flags&flagLast != 0
		if e.logical > maxOffset || e.length > maxOffset-e.logical || e.physical > maxOffset {
			return nil, fmt.Errorf("the filesystem tells of an extent of %d bytes at %d", e.length, e.logical)
		}
		x := Extent{Offset: int64(e.logical), Length: int64(e.length), State: e.state(), Physical: int64(e.physical)}
		if x, ok := x.cut(from, m.to); ok {
			extents = append(extents, x)
			m.at = x.end()
		}
	}
	if !m.ended && len(extents) == 0 {
		return nil, fmt.Errorf("the filesystem tells nothing of what follows %d", m.at)
	}
	return extents, nil
}

// cut gives what of an extent is in [from, to), if anything.
func (e Extent) cut(from, to int64) (Extent, bool) {
	if before := from - e.Offset; before > 0 {
		e.Offset, e.Length, e.Physical = from, e.Length-before, e.Physical+before
	}
	e.Length = min(e.Length, to-e.Offset)
	return e, e.Length > 0
}

// The structures and constants of include/uapi/linux/fiemap.h and fs.h; the
// request's encoding is that of amd64, arm64, riscv64 and s390x.
const (
	fsIocFiemap = 0xc020660b
	flagSync    = 0x1 // FIEMAP_FLAG_SYNC

	flagLast      = 0x1    // FIEMAP_EXTENT_LAST
	flagUnwritten = 0x800  // FIEMAP_EXTENT_UNWRITTEN
	flagMerged    = 0x1000 // FIEMAP_EXTENT_MERGED
	flagShared    = 0x2000 // FIEMAP_EXTENT_SHARED
)

const maxOffset = 1<<63 - 1

// fiemapBatch is how many extents are asked for at once. What a batch costs is
// the filesystem's looking up each extent; a few hundred are as cheap as any
// number, each, and some thousand take some milliseconds, in which the context
// is not looked at.
const fiemapBatch = 2048

// fiemapRequest is struct fiemap with its extents.
type fiemapRequest struct {
	start, length       uint64
	flags, mapped, room uint32
	_                   uint32
	extents             [fiemapBatch]fiemapExtent
}

// fiemapExtent is struct fiemap_extent.
type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

// state tells what an extent's flags say of it. Whether it is the last, was
// merged of several, or is shared with another file, says nothing of its bytes;
// sharing comes and goes with the other file. Any other flag (compressed, inline,
// encrypted, not allocated yet, or one that is not known here) means that equal
// places need not be equal bytes.
func (e *fiemapExtent) state() State {
	switch e.flags &^ (flagLast | flagMerged | flagShared) {
	case 0:
		return Located
	case flagUnwritten:
		return Reserved
	default:
		return Opaque
	}
}

// ioctl makes a request of f's filesystem, which takes or fills argument.
func ioctl(f *os.File, request uintptr, argument unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(argument))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
