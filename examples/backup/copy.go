package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// piece is how many bytes are read at once; zeros is as many of them.
const piece = 64 << 10

var zeros [piece]byte

// copyRange copies n bytes at off to the same place in a file. Where they are
// zeros, the file gets a hole.
func copyRange(ctx context.Context, file, device *os.File, off, n int64, buffer []byte) error {
	for end := off + n; off < end; off += piece {
		if err := ctx.Err(); err != nil {
			return err
		}
		data := buffer[:min(piece, end-off)]
		if _, err := device.ReadAt(data, off); err != nil {
			return fmt.Errorf("reading at %d: %w", off, err)
		}
		if !bytes.Equal(data, zeros[:len(data)]) {
			if _, err := file.WriteAt(data, off); err != nil {
				return err
			}
			continue
		}
		err := unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(data)))
		if errors.Is(err, unix.EOPNOTSUPP) {
			_, err = file.WriteAt(data, off)
		}
		if err != nil {
			return fmt.Errorf("a hole in %s at %d: %w", file.Name(), off, err)
		}
	}
	return nil
}

// equal compares n bytes of two files, all of them.
func equal(ctx context.Context, a, b *os.File, n int64) error {
	left, right := make([]byte, piece), make([]byte, piece)
	for off := int64(0); off < n; off += piece {
		if err := ctx.Err(); err != nil {
			return err
		}
		size := min(piece, n-off)
		for f, data := range map[*os.File][]byte{a: left[:size], b: right[:size]} {
			if _, err := f.ReadAt(data, off); err != nil {
				return fmt.Errorf("reading %s at %d: %w", f.Name(), off, err)
			}
		}
		if !bytes.Equal(left[:size], right[:size]) {
			return fmt.Errorf("%s and %s differ between %d and %d", a.Name(), b.Name(), off, off+size)
		}
	}
	return nil
}
