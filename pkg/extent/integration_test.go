//go:build integration

package extent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/loop"
)

var ctx = context.Background()

// onEach runs a test on each filesystem that pools are made on.
func onEach(t *testing.T, test func(t *testing.T, fs, dir string)) {
	for _, fs := range []string{"xfs", "ext4", "btrfs"} {
		t.Run(fs, func(t *testing.T) { test(t, fs, mountImage(t, "mkfs."+fs, fs)) })
	}
}

func TestACloneHasTheSameBytesAndItsOwnFate(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		src, dst := newFile(t, dir, 8*MiB), newFile(t, dir, 0)
		data := random(4 * MiB)
		write(t, src, 2*MiB, data) // in the page cache still
		err := extent.Clone(dst, src)
		if fs == "ext4" {
			if !errors.Is(err, extent.ErrUnsupported) {
				t.Errorf("%v; want ErrUnsupported", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		before := read(t, src)
		if !bytes.Equal(read(t, dst), before) {
			t.Error("the clone differs")
		}
		write(t, dst, 0, data)
		if !bytes.Equal(read(t, src), before) {
			t.Error("writing to the clone changed the source")
		}
	})
}

func TestCloneBetweenFilesystemsIsErrUnsupported(t *testing.T) {
	src := newFile(t, mountImage(t, "mkfs.xfs", "xfs"), MiB)
	for name, dst := range map[string]*os.File{
		"another of the kind": newFile(t, mountImage(t, "mkfs.xfs", "xfs"), 0),
		"another kind":        newFile(t, t.TempDir(), 0),
	} {
		if err := extent.Clone(dst, src); !errors.Is(err, extent.ErrUnsupported) {
			t.Errorf("%s: %v; want ErrUnsupported", name, err)
		}
	}
}

func TestCloneOnAnXFSWithoutReflinkIsErrUnsupported(t *testing.T) {
	dir := mountImage(t, "mkfs.xfs -m reflink=0", "xfs")
	src, dst := newFile(t, dir, MiB), newFile(t, dir, 0)
	if err := extent.Clone(dst, src); !errors.Is(err, extent.ErrUnsupported) {
		t.Errorf("%v; want ErrUnsupported", err)
	}
}

func TestCopyKeepsHoles(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		for name, dst := range map[string]*os.File{"same filesystem": newFile(t, dir, 0), "another": newFile(t, t.TempDir(), 0)} {
			src := newFile(t, dir, 200*MiB+123)
			for _, off := range []int64{0, 70 * MiB, 150 * MiB, 199 * MiB} {
				write(t, src, off, random(MiB))
			}
			// Never written, so a hole in the copy.
			if err := unix.Fallocate(int(src.Fd()), 0, 100*MiB, 16*MiB); err != nil {
				t.Fatal(err)
			}
			if err := extent.Copy(ctx, dst, src); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(read(t, dst), read(t, src)) {
				t.Errorf("%s: the copy differs", name)
			}
			if err := dst.Sync(); err != nil {
				t.Fatal(err)
			}
			if got := allocated(t, dst); got > 5*MiB {
				t.Errorf("%s: 4 MiB of data occupy %d bytes in the copy", name, got)
			}
		}
	})
}

func TestOnlyWhatWasNeverWrittenIsBlank(t *testing.T) {
	const size = 16 * MiB
	fallocate := func(mode uint32) func(*testing.T, *os.File) {
		return func(t *testing.T, f *os.File) {
			if err := unix.Fallocate(int(f.Fd()), mode, 0, size); err != nil {
				t.Fatal(err)
			}
		}
	}
	dirty := func(data []byte) func(*testing.T, *os.File) {
		return func(t *testing.T, f *os.File) { write(t, f, size-int64(len(data)), data) }
	}
	sync := func(t *testing.T, f *os.File) {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	cached := func(t *testing.T, f *os.File) { read(t, f) }
	mapped := func(t *testing.T, f *os.File) {
		m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Munmap(m) })
		m[size/2] = 1
	}
	direct := func(t *testing.T, f *os.File) {
		d, err := os.OpenFile(f.Name(), os.O_WRONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(page)
		page[100] = 1
		write(t, d, 8192, page)
	}
	prepare := func(t *testing.T, f *os.File) {
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if err := extent.Prepare(f, 64<<10); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
	}
	zero := func(allocated bool) func(*testing.T, *os.File) {
		return func(t *testing.T, f *os.File) {
			if err := extent.Zero(ctx, f, allocated); err != nil {
				t.Fatal(err)
			}
		}
	}
	clone := func(t *testing.T, f *os.File) {
		c := newFile(t, filepath.Dir(f.Name()), 0)
		if err := extent.Clone(c, f); err != nil && !errors.Is(err, extent.ErrUnsupported) {
			t.Fatal(err)
		}
	}
	allocate, zeros, data := fallocate(0), make([]byte, 4096), random(1)

	type steps = []func(*testing.T, *os.File)
	for _, c := range []struct {
		name  string
		steps steps
		want  bool
	}{
		{"sparse", steps{}, true},
		{"sparse, read", steps{cached}, true},
		{"preallocated", steps{allocate}, true},
		{"preallocated, synced", steps{allocate, sync}, true},
		{"preallocated, read", steps{allocate, cached}, true},
		{"prepared", steps{prepare}, true},
		{"prepared, preallocated, synced", steps{prepare, allocate, sync}, true},
		{"blank, cloned", steps{allocate, clone}, true},
		{"punched", steps{dirty(data), sync, zero(false)}, true},
		{"punched before it was on disk", steps{dirty(data), zero(false)}, true},
		{"zeroed in place", steps{dirty(data), sync, zero(true)}, true},
		{"zeroed in place before it was on disk", steps{dirty(data), zero(true)}, true},
		{"zeroed in place, read", steps{dirty(data), sync, zero(true), cached}, true},
		{"written data, cloned, zeroed", steps{dirty(data), clone, zero(true)}, true},

		{"one byte at the end, not on disk", steps{dirty(data)}, false},
		{"one byte at the end, on disk", steps{dirty(data), sync}, false},
		{"one byte in preallocated, not on disk", steps{allocate, dirty(data)}, false},
		{"one byte in preallocated, on disk", steps{allocate, dirty(data), sync}, false},
		{"one byte in prepared", steps{prepare, dirty(data)}, false},
		{"one byte in prepared, preallocated", steps{prepare, allocate, dirty(data), sync}, false},
		{"one byte through a mapping", steps{mapped}, false},
		{"one byte through a mapping of preallocated", steps{allocate, mapped}, false},
		{"one byte directly", steps{direct}, false},
		{"one byte directly in preallocated", steps{allocate, direct}, false},
		{"one byte, preallocated after", steps{dirty(data), allocate}, false},
		{"zeroed, then one byte", steps{zero(true), dirty(data)}, false},
		{"cloned, then one byte", steps{allocate, clone, dirty(data)}, false},
		// Written zeros are as good as zeros, but it takes reading to know.
		{"zeros, not on disk", steps{dirty(zeros)}, false},
		{"zeros, on disk", steps{dirty(zeros), sync}, false},
		{"zeros in preallocated", steps{allocate, dirty(zeros), sync}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			onEach(t, func(t *testing.T, fs, dir string) {
				f := newFile(t, dir, size)
				for _, step := range c.steps {
					step(t, f)
				}
				expectBlank(t, f, c.want)
				expectBlank(t, f, c.want) // and looking changes nothing
			})
		})
	}
}
