// Package extent is what a filesystem offers below a file: blocks that two
// files share, holes, and blocks that are allocated before they are written.
//
// It knows files and nothing of what they are for. It never decides for the
// caller: what the filesystem cannot do is ErrUnsupported, and is not done
// another way. Nothing is on stable storage before the caller syncs the file.
package extent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUnsupported says that the filesystem cannot do it with these files.
var ErrUnsupported = errors.New("not supported by the filesystem")

// piece is how many bytes are worked on between two looks at the context:
// under a second on any disk, and a multiple of any block size.
const piece = 64 << 20

// Blank reports whether f provably holds nothing but zeros: it has no data at
// all, or its blocks are allocated and were never written. It does not read f,
// so zeros that were written count as data. false is therefore no proof of the
// contrary; true is a proof, of the file and as of now: what is in the page
// cache of a block device on top of it is not in the file yet.
//
// It brings f to stable storage. See SEEK_DATA in lseek(2), which moves the
// file's offset.
func Blank(f *os.File) (bool, error) {
	// Only what the filesystem has on disk shall count, not how well it
	// combines that with its page cache: data that is not written yet has to
	// count, and blocks that were never written must not, though some
	// filesystems count them once they have been read.
	if err := f.Sync(); err != nil {
		return false, err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return false, fmt.Errorf("drop the page cache of %s: %w", f.Name(), err)
	}
	_, err := f.Seek(0, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return true, nil
	}
	return false, err
}

// Allocate makes sure that [off, off+n) of f can be written without needing a
// new block, unless it is shared with another file: see Unshare. What is there
// stays, and the rest reads as zeros. The file becomes off+n bytes long if it
// is shorter. Without room it fails with unix.ENOSPC; part of the blocks may
// have been allocated then.
func Allocate(ctx context.Context, f *os.File, off, n int64) error {
	return fallocate(ctx, "allocate", f, unix.FALLOC_FL_ALLOCATE_RANGE, off, n)
}

// Zero makes the whole of f read as zeros. If allocated, its blocks stay or
// become allocated, else they are given back, but for a last block that is in
// the file only in part. Its size stays.
func Zero(ctx context.Context, f *os.File, allocated bool) error {
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	if allocated {
		mode = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
	}
	return whole(ctx, "zero", f, mode)
}

// Unshare gives f blocks of its own for all that it shares with other files,
// and for its holes, so that nothing in it needs a new block to be written.
// Without room it fails with unix.ENOSPC, and has then done a part. On
// filesystems that have shared blocks and no such operation (btrfs), as on
// those without shared blocks, it is ErrUnsupported.
func Unshare(ctx context.Context, f *os.File) error {
	return whole(ctx, "unshare", f, unix.FALLOC_FL_UNSHARE_RANGE)
}

func whole(ctx context.Context, what string, f *os.File, mode uint32) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return fallocate(ctx, what, f, mode, 0, info.Size())
}

// fallocate is fallocate(2) in pieces.
func fallocate(ctx context.Context, what string, f *os.File, mode uint32, off, n int64) error {
	for end := off + n; off < end; off += piece {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s %s: %w", what, f.Name(), context.Cause(ctx))
		}
		n := min(piece, end-off)
		err := unix.Fallocate(int(f.Fd()), mode, off, n)
		for errors.Is(err, unix.EINTR) { // the runtime sends itself signals
			err = unix.Fallocate(int(f.Fd()), mode, off, n)
		}
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("%s %s: %w", what, f.Name(), ErrUnsupported)
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", what, f.Name(), err)
		}
	}
	return nil
}
