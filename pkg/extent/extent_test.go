package extent_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
)

const MiB = 1 << 20

func TestAFileWithoutDataIsBlank(t *testing.T) {
	for _, size := range []int64{0, 1, 4096, 8*MiB + 1} {
		expectBlank(t, newFile(t, t.TempDir(), size), true)
	}
}

func TestCopyIsEqual(t *testing.T) {
	for name, size := range map[string]int64{"empty": 0, "a byte": 1, "whole blocks": 8 * MiB, "an odd end": 8*MiB + 123} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			src, dst := newFile(t, dir, size), newFile(t, dir, 0)
			write(t, src, size/2, random(int(size-size/2)))
			if err := extent.Copy(context.Background(), dst, src); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(read(t, dst), read(t, src)) {
				t.Error("the copy differs")
			}
		})
	}
}

func TestCopyBetweenFilesystems(t *testing.T) {
	src := newFile(t, t.TempDir(), 8*MiB+123)
	write(t, src, MiB, random(2*MiB))
	fd, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC) // a file on tmpfs
	if err != nil {
		t.Fatal(err)
	}
	dst := os.NewFile(uintptr(fd), "memfd")
	defer dst.Close()
	if err := extent.Copy(context.Background(), dst, src); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, dst), read(t, src)) {
		t.Error("the copy differs")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(dst.Fd()), &st); err != nil || st.Blocks*512 > 2*MiB+4096 {
		t.Errorf("the copy of 2 MiB of data occupies %d blocks of 512 bytes, %v", st.Blocks, err)
	}
}

func TestAContextThatEndedStopsTheWork(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("the caller went away")
	cancel(why)
	dir := t.TempDir()
	f, dst := newFile(t, dir, MiB), newFile(t, dir, 0)
	write(t, f, 0, random(MiB))
	for what, err := range map[string]error{
		"Copy":     extent.Copy(ctx, dst, f),
		"Allocate": extent.Allocate(ctx, f, 0, 2*MiB),
		"Zero":     extent.Zero(ctx, f, false),
		"Unshare":  extent.Unshare(ctx, f),
	} {
		if !errors.Is(err, why) {
			t.Errorf("%s: %v; want the context's cause", what, err)
		}
	}
	if !bytes.Equal(read(t, f), random(MiB)) {
		t.Error("the file was changed")
	}
}

func newFile(t *testing.T, dir string, size int64) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "data")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t *testing.T, f *os.File, off int64, data []byte) {
	t.Helper()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, f *os.File) []byte {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	return data
}

// random returns the same bytes each time, none of them zero, in a pattern that
// is no multiple of any block.
func random(n int) []byte {
	var seed [32]byte
	pattern := make([]byte, min(n, 65521))
	rand.NewChaCha8(seed).Read(pattern)
	for i := range pattern {
		pattern[i] |= 1
	}
	return slices.Repeat(pattern, n/max(1, len(pattern))+1)[:n]
}

func expectBlank(t *testing.T, f *os.File, want bool) {
	t.Helper()
	if got, err := extent.Blank(f); err != nil || got != want {
		t.Errorf("blank: %v, %v; want %v", got, err, want)
	}
}
