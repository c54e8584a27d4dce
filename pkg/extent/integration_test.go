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

// Whether blocks can be shared is known also where none is free, and nothing is
// changed to find out.
func TestSharesAgreesWithClone(t *testing.T) {
	dirs := map[string]string{"xfs without reflink": mountImage(t, "mkfs.xfs -m reflink=0", "xfs")}
	for _, fs := range []string{"xfs", "ext4", "btrfs"} {
		dirs[fs] = mountImage(t, "mkfs."+fs, fs)
	}
	for name, dir := range dirs {
		f, dst := newFile(t, dir, 0), newFile(t, dir, 0)
		data := random(MiB)
		write(t, f, 0, data)
		err := extent.Clone(dst, f)
		if err != nil && !errors.Is(err, extent.ErrUnsupported) {
			t.Fatal(err)
		}
		fill := newFile(t, dir, 0)
		for written := error(nil); written == nil; {
			_, written = fill.Write(data)
		}
		if shares, askErr := extent.Shares(f); askErr != nil || shares != (err == nil) {
			t.Errorf("%s: %v, %v; to clone gave %v", name, shares, askErr, err)
		}
		if !bytes.Equal(read(t, f), data) {
			t.Errorf("%s: the file is not what it was", name)
		}
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
		t.Cleanup(func() { _ = unix.Munmap(m) })
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
		defer func() { _ = unix.Munmap(page) }()
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
	cases := []struct {
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
	}
	onEach(t, func(t *testing.T, fs, dir string) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				f := newFile(t, dir, size)
				for _, step := range c.steps {
					step(t, f)
				}
				expectBlank(t, f, c.want)
				expectBlank(t, f, c.want) // and looking changes nothing
			})
		}
	})
}

func TestWhatIsBlankReadsAsZerosWhateverWasDone(t *testing.T) {
	const size, unit = MiB, 4096
	onEach(t, func(t *testing.T, fs, dir string) {
		blank, checks := 0, 0
		for seed := range uint64(30) {
			r := rand.New(rand.NewPCG(seed, 0))
			f, clone := newFile(t, dir, size), newFile(t, dir, 0)
			if seed%2 == 1 {
				if err := f.Truncate(0); err != nil {
					t.Fatal(err)
				}
				if err := extent.Prepare(f, 16<<10); err != nil {
					t.Fatal(err)
				}
				if err := f.Truncate(size); err != nil {
					t.Fatal(err)
				}
			}
			device, err := loop.Attach(f, loop.Options{BlockSize: unit})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { // for a test that fails; otherwise it is gone by then
				if err := device.Detach(ctx); err != nil && !errors.Is(err, loop.ErrDetached) {
					t.Error(err)
				}
			})
			var done []string
			for range 12 {
				off := r.Int64N(size/unit) * unit
				n := min(1+r.Int64N(16), (size-off)/unit) * unit
				var err error
				op := []string{"write", "write through the device", "sync", "read", "preallocate", "punch", "zero range", "zero", "zero in place", "clone", "truncate"}[r.IntN(11)]
				switch op {
				case "write":
					_, err = f.WriteAt(random(int(n)), off)
				case "write through the device":
					var d *os.File
					if d, err = os.OpenFile(device.Path, os.O_WRONLY, 0); err == nil {
						_, err = d.WriteAt(random(int(n)), off)
						// Only the last close would bring it to the
						// file, and others may have the device open.
						err = errors.Join(err, d.Sync(), d.Close())
					}
				case "sync":
					err = f.Sync()
				case "read":
					read(t, f)
				case "preallocate":
					err = unix.Fallocate(int(f.Fd()), 0, off, n)
				case "punch":
					err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
				case "zero range":
					err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
				case "zero":
					err = extent.Zero(ctx, f, false)
				case "zero in place":
					err = extent.Zero(ctx, f, true)
				case "clone":
					if err = extent.Clone(clone, f); errors.Is(err, extent.ErrUnsupported) {
						err = nil
					}
				case "truncate":
					if err = f.Truncate(off); err == nil {
						err = f.Truncate(size)
					}
				}
				if err != nil {
					t.Fatalf("seed %d, %s: %v", seed, op, err)
				}
				done = append(done, op)
				is, err := extent.Blank(f)
				if err != nil {
					t.Fatal(err)
				}
				checks++
				if !is {
					continue
				}
				blank++
				if !bytes.Equal(read(t, f), make([]byte, size)) {
					t.Fatalf("seed %d: called blank, but is not, after %s", seed, strings.Join(done, ", "))
				}
			}
			if err := device.Detach(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if blank < checks/10 {
			t.Errorf("blank in only %d of %d cases: the test shows little", blank, checks)
		}
	})
}

func TestAllocateKeepsTheDataAndTakesTheBlocks(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		f := newFile(t, dir, 8*MiB)
		write(t, f, MiB, random(MiB))
		want := append(read(t, f), make([]byte, 92*MiB)...)
		if err := extent.Allocate(ctx, f, 0, 100*MiB); err != nil {
			t.Fatal(err)
		}
		if got := allocated(t, f); got < 100*MiB {
			t.Errorf("%d bytes are allocated", got)
		}
		if !bytes.Equal(read(t, f), want) {
			t.Error("the bytes changed")
		}
	})
}

func TestAllocateWithoutRoomIsENOSPC(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		if err := extent.Allocate(ctx, newFile(t, dir, 0), 0, 1024*MiB); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%v; want ENOSPC", err)
		}
	})
}

func TestZeroGivesBlocksBackOrKeepsThem(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		for _, keep := range []bool{false, true} {
			f := newFile(t, dir, 100*MiB)
			write(t, f, 0, random(4*MiB))
			write(t, f, 70*MiB, random(4*MiB))
			write(t, f, 100*MiB-123, random(123))
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := extent.Zero(ctx, f, keep); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(read(t, f), make([]byte, 100*MiB)) {
				t.Error("it does not read as zeros")
			}
			if got := allocated(t, f); keep && got < 100*MiB || !keep && got != 0 {
				t.Errorf("keep %v: %d bytes are allocated", keep, got)
			}
		}
	})
}

func TestUnshareMakesRoomForAllLaterWrites(t *testing.T) {
	onEach(t, func(t *testing.T, fs, dir string) {
		src, f := newFile(t, dir, 100*MiB), newFile(t, dir, 0)
		write(t, src, 0, random(70*MiB)) // the rest is a hole
		if fs == "ext4" {
			if err := extent.Unshare(ctx, src); !errors.Is(err, extent.ErrUnsupported) {
				t.Errorf("%v; want ErrUnsupported", err)
			}
			return
		}
		if err := extent.Clone(f, src); err != nil {
			t.Fatal(err)
		}
		err := extent.Unshare(ctx, f)
		if fs == "btrfs" {
			if !errors.Is(err, extent.ErrUnsupported) {
				t.Errorf("%v; want ErrUnsupported", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, f), read(t, src)) {
			t.Error("the bytes changed")
		}
		// Take all room that is left, so that a write that needs any fails.
		var full unix.Statfs_t
		rest := newFile(t, dir, 0)
		for n := int64(256 * MiB); n >= 4096; n /= 2 {
			info, err := rest.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if err := extent.Allocate(ctx, rest, info.Size(), n); err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		}
		if err := unix.Fstatfs(int(f.Fd()), &full); err != nil {
			t.Fatal(err)
		}
		write(t, f, 0, random(100*MiB))
		if err := f.Sync(); err != nil {
			t.Errorf("%v with %d blocks free: a write needed new blocks", err, full.Bavail)
		}
		if err := src.Sync(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAPreparedFileOnXFSIsAllocatedInUnitsOfTheHint(t *testing.T) {
	dir := mountImage(t, "mkfs.xfs", "xfs")
	for _, hint := range []uint32{0, 64 << 10, MiB} {
		f := newFile(t, dir, 0)
		if err := extent.Prepare(f, hint); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(64 * MiB); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{0, 10*MiB + 4096, 20*MiB + 300<<10} {
			write(t, f, off, random(4096))
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if got, want := allocated(t, f), 3*max(int64(hint), 4096); got != want {
			t.Errorf("hint %d: three blocks occupy %d bytes; want %d", hint, got, want)
		}
		out, err := exec.Command("xfs_io", "-r", "-c", "extsize", "-c", "cowextsize", f.Name()).CombinedOutput()
		if want := fmt.Sprintf("[%d] %s\n[%d] %s\n", hint, f.Name(), hint, f.Name()); err != nil || string(out) != want {
			t.Errorf("xfs_io says %s, %v; want %s", out, err, want)
		}
	}
}

func TestAnExtentSizeThatXFSCannotKeepIsRefused(t *testing.T) {
	dir := mountImage(t, "mkfs.xfs", "xfs")
	if err := extent.Prepare(newFile(t, dir, 0), 1000); err == nil {
		t.Error("1000 is no multiple of a block, and was accepted")
	}
	f := newFile(t, dir, 0)
	write(t, f, 0, random(4096))
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := extent.Prepare(f, 64<<10); err == nil {
		t.Error("the file is not empty, and was accepted")
	}
}

func TestPrepareOnAnXFSWithoutReflinkHintsTheExtentSizeAlone(t *testing.T) {
	f := newFile(t, mountImage(t, "mkfs.xfs -m reflink=0", "xfs"), 0)
	if err := extent.Prepare(f, 64<<10); err != nil {
		t.Fatal(err)
	}
	write(t, f, 0, random(4096))
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := allocated(t, f); got != 64<<10 {
		t.Errorf("a block occupies %d bytes", got)
	}
}

func TestPreparedFilesOnBtrfsAreOverwrittenInPlaceAndCloned(t *testing.T) {
	dir := mountImage(t, "mkfs.btrfs", "btrfs")
	src, dst, plain := newFile(t, dir, 0), newFile(t, dir, 0), newFile(t, dir, 0)
	for _, f := range []*os.File{src, dst} {
		if err := extent.Prepare(f, 0); err != nil {
			t.Fatal(err)
		}
	}
	const size = 4 * MiB
	write(t, src, 0, random(size))
	if err := src.Sync(); err != nil {
		t.Fatal(err)
	}
	before := physical(t, src)
	for off := int64(0); off < size; off += 64 << 10 {
		write(t, src, off, random(4096))
		if err := src.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if after := physical(t, src); !slices.Equal(before, after) {
		t.Errorf("overwriting moved it from %v to %v", before, after)
	}
	if err := extent.Clone(plain, src); !errors.Is(err, extent.ErrUnsupported) {
		t.Errorf("clone to a file that is not prepared: %v; want ErrUnsupported", err)
	}
	if err := extent.Clone(dst, src); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, dst), read(t, src)) {
		t.Error("the clone differs")
	}
}

func TestPrepareOnExt4IsNothing(t *testing.T) {
	if err := extent.Prepare(newFile(t, mountImage(t, "mkfs.ext4", "ext4"), 0), MiB); err != nil {
		t.Error(err)
	}
}

func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512 // stat(2)
}

// physical returns where the first extents of f are on the disk (FS_IOC_FIEMAP,
// Documentation/filesystems/fiemap.rst).
func physical(t *testing.T, f *os.File) []uint64 {
	t.Helper()
	var m struct {
		start, length           uint64
		flags, mapped, count, _ uint32
		extents                 [64]struct {
			logical, physical, length uint64
			_                         [2]uint64
			flags                     uint32
			_                         [3]uint32
		}
	}
	m.length, m.count = 1<<62, uint32(len(m.extents))
	const fiemap = 0xc020660b
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		t.Fatal(errno)
	}
	var places []uint64
	for _, e := range m.extents[:m.mapped] {
		places = append(places, e.physical)
	}
	return places
}

// mountImage makes and mounts a filesystem of 512 MiB for the length of the
// test.
func mountImage(t *testing.T, mkfs, fs string) string {
	t.Helper()
	return mount(t, mkfs, fs, loop.Options{})
}

func mount(t *testing.T, mkfs, fs string, o loop.Options) string {
	t.Helper()
	device, err := loop.Attach(newFile(t, t.TempDir(), 512*MiB), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := device.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
	words := append(strings.Fields(mkfs), device.Path)
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(device.Path, dir, fs, 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}
