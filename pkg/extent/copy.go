package extent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// Clone makes dst, an empty file, share all of src's blocks (ioctl_ficlone(2)).
// It is atomic: dst gets what src held at one instant, including what is in
// src's page cache. Writes to src wait for the length of the call, which grows
// with the number of src's extents. Files of two filesystems, and on btrfs
// files of which only one was made by [Prepare], are ErrUnsupported.
func Clone(dst, src *os.File) error {
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("clone %s to %s: %w (%w)", src.Name(), dst.Name(), ErrUnsupported, err)
	case err != nil:
		return fmt.Errorf("clone %s to %s: %w", src.Name(), dst.Name(), err)
	}
	return nil
}

// Shares tells whether [Clone] can work between f and others like it, without
// a block to spare: f, a file that is open for writing and not empty, is cloned
// onto itself, which the kernel refuses as unsupported or, where it is not, as
// senseless. f stays as it is.
func Shares(f *os.File) (bool, error) {
	err := unix.IoctlFileClone(int(f.Fd()), int(f.Fd()))
	switch {
	case err == nil, errors.Is(err, unix.EINVAL):
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		return false, nil
	}
	return false, fmt.Errorf("clone %s to itself: %w", f.Name(), err)
}

// Copy makes dst, an empty file, equal to src, with its holes. What src has
// allocated and never written is a hole in dst. Nobody may write to src
// meanwhile, because parts are copied one after the other. It moves src's
// offset. On a filesystem with shared blocks, the kernel may share them.
func Copy(ctx context.Context, dst, src *os.File) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	for r, err := range Data(src, 0, info.Size()) {
		if err != nil {
			return err
		}
		end := r.Offset + r.Length
		for off := r.Offset; off < end; off += piece {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("copy %s: %w", src.Name(), context.Cause(ctx))
			}
			if err := copyRange(dst, src, off, min(off+piece, end)); err != nil {
				return fmt.Errorf("copy %s to %s: %w", src.Name(), dst.Name(), err)
			}
		}
	}
	return nil
}

// Data gives the ranges of [from, to) in which f has data, as lseek(2) tells it,
// ordered and not empty: all else reads as zeros. It moves f's offset. An error
// is the last that it gives.
func Data(f *os.File, from, to int64) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		for end := from; end < to; {
			start, err := f.Seek(end, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return // no data behind end
			}
			if err == nil {
				end, err = f.Seek(start, unix.SEEK_HOLE)
			}
			if err != nil {
				yield(Range{}, err)
				return
			}
			if start >= to || !yield(Range{start, min(end, to) - start}, nil) {
				return
			}
		}
	}
}

// copyRange copies [off, end) of src to the same place in dst.
func copyRange(dst, src *os.File, off, end int64) error {
	for off < end {
		from, to := off, off
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(end-off), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), err == nil && n == 0:
			// Not between these filesystems (copy_file_range(2)). 0 is the
			// end of src, or what some kernels say instead.
			_, err := io.CopyN(io.NewOffsetWriter(dst, off), io.NewSectionReader(src, off, end-off), end-off)
			if errors.Is(err, io.EOF) {
				return io.ErrUnexpectedEOF // src became shorter
			}
			return err
		case err != nil:
			return err
		}
		off += int64(n)
	}
	return nil
}
