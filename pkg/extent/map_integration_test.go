//go:build integration

package extent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
)

const block = 4096

// rounds is how often a test repeats something that only may go wrong;
// ORLOP_TEST_ROUNDS multiplies it.
func rounds(t *testing.T, n int) int {
	t.Helper()
	s := os.Getenv("ORLOP_TEST_ROUNDS")
	if s == "" {
		return n
	}
	factor, err := strconv.Atoi(s)
	if err != nil || factor < 1 {
		t.Fatalf("ORLOP_TEST_ROUNDS=%s is not a positive number", s)
	}
	return n * factor
}

func extents(t *testing.T, f *os.File, from, to int64) (all []extent.Extent) {
	t.Helper()
	for batch, err := range extent.Map(ctx, f, from, to) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, batch...)
	}
	return all
}

func TestAMapTellsWhatWasWritten(t *testing.T) {
	onEach(t, func(t *testing.T, _, dir string) {
		f := newFile(t, dir, 64*MiB)
		write(t, f, 8*MiB, random(MiB)) // in the page cache still
		if err := unix.Fallocate(int(f.Fd()), 0, 32*MiB, 2*MiB); err != nil {
			t.Fatal(err)
		}
		var got []extent.Range
		located, reserved := int64(0), int64(0)
		for _, e := range extents(t, f, 0, 64*MiB) {
			switch e.State {
			case extent.Located:
				located += e.Length
			case extent.Reserved:
				reserved += e.Length
			case extent.Opaque:
				t.Errorf("opaque: %+v", e)
			}
			got = append(got, extent.Range{Offset: e.Offset, Length: e.Length})
		}
		if located != MiB || reserved != 2*MiB || got[0].Offset != 8*MiB {
			t.Errorf("%d bytes written, %d reserved: %v", located, reserved, got)
		}
		// A part of the map is cut to what was asked for.
		if got := collect(t, extent.None, extent.Map(ctx, f, 8*MiB+100, 8*MiB+300), 8*MiB+100, 8*MiB+300); !slices.Equal(got, []extent.Range{{Offset: 8*MiB + 100, Length: 200}}) {
			t.Errorf("of a part: %v", got)
		}
		if got := extents(t, f, 40*MiB, 64*MiB); got != nil {
			t.Errorf("of a hole: %v", got)
		}
		if got := extents(t, f, 64*MiB, 64*MiB); got != nil {
			t.Errorf("of nothing: %v", got)
		}
	})
}

// A map of more extents than one look gives is whole, and in order.
func TestAMapOfManyExtentsIsWhole(t *testing.T) {
	onEach(t, func(t *testing.T, _, dir string) {
		const n = 2500
		f := newFile(t, dir, 2*n*block)
		data := random(block)
		for i := range int64(n) {
			write(t, f, 2*i*block, data)
		}
		next := int64(0)
		for r, err := range extent.Changed(extent.None, extent.Map(ctx, f, 0, 2*n*block), 0, 2*n*block) {
			if err != nil {
				t.Fatal(err)
			}
			if r != (extent.Range{Offset: next, Length: block}) {
				t.Fatalf("%v, want %d", r, next)
			}
			next += 2 * block
		}
		if next != 2*n*block {
			t.Errorf("ended at %d", next)
		}
		for batch, err := range extent.Map(ctx, f, 0, 2*n*block) { // and can be left at any time
			if err != nil || len(batch) == 0 {
				t.Error(batch, err)
			}
			break
		}
	})
}

func TestAMapEndsWithItsContext(t *testing.T) {
	f := newFile(t, mountImage(t, "mkfs.xfs", "xfs"), MiB)
	write(t, f, 0, random(MiB))
	why := errors.New("the caller went away")
	ended, cancel := context.WithCancelCause(ctx)
	cancel(why)
	var last error
	for _, err := range extent.Map(ended, f, 0, MiB) {
		last = err
	}
	if !errors.Is(last, why) {
		t.Errorf("%v", last)
	}
}

func TestAFilesystemWithoutMapsIsErrUnsupported(t *testing.T) {
	fd, err := unix.MemfdCreate("map", unix.MFD_CLOEXEC) // a file on tmpfs
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	write(t, f, 0, random(MiB))
	var last error
	for _, err := range extent.Map(ctx, f, 0, MiB) {
		last = err
	}
	if !errors.Is(last, extent.ErrUnsupported) {
		t.Errorf("%v; want ErrUnsupported", last)
	}
}

// What is compressed, or kept among the metadata, has no place that tells its
// bytes, and counts as changed.
func TestWhatHasNoPlaceIsChanged(t *testing.T) {
	dir := mountImage(t, "mkfs.btrfs", "btrfs")
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "compress-force=zlib"); err != nil {
		t.Fatal(err)
	}
	for rule, data := range map[string][]byte{"compressed": bytes.Repeat([]byte("orlop "), MiB/6), "inline": []byte("a few bytes")} {
		src, dst := newFile(t, dir, 0), newFile(t, dir, 0)
		write(t, src, 0, data)
		if err := src.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := extent.Clone(dst, src); err != nil {
			t.Fatal(err)
		}
		n := int64(len(data))
		got := collect(t, extent.Map(ctx, src, 0, n), extent.Map(ctx, dst, 0, n), 0, n)
		if !slices.Equal(got, []extent.Range{{Offset: 0, Length: n}}) {
			t.Errorf("%s: %v", rule, got)
		}
	}
}

// An image is written in all the ways there are, and reflinks of it are kept
// and deleted. Between any two that exist, Changed finds exactly the blocks that
// were written, no more and no fewer; and every byte that differs is in one.
func TestChangedIsExactWhateverWasWritten(t *testing.T) {
	const size = 2 * MiB
	for _, c := range []struct {
		name, mkfs, fs string
		hint           uint32
	}{
		{"xfs", "mkfs.xfs", "xfs", 0},
		{"xfs in units of 128 KiB", "mkfs.xfs", "xfs", 128 << 10},
		{"btrfs", "mkfs.btrfs", "btrfs", 128 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			w := newImage(t, mountImage(t, c.mkfs, c.fs), size, c.hint, rand.New(rand.NewPCG(seed, 0)))
			var pairs, differing int
			for range rounds(t, 40) {
				for range 1 + w.r.IntN(6) {
					w.write(t)
				}
				target := w.cut(t)
				for _, base := range w.kept {
					pairs++
					differing += w.mustBeExact(t, base, target)
					if w.r.IntN(4) == 0 { // the other way round it is the same
						w.mustBeExact(t, target, base)
					}
				}
				if got := collect(t, extent.Map(ctx, target.f, 0, size), extent.Map(ctx, target.f, 0, size), 0, size); got != nil {
					t.Fatalf("%s differs from itself: %v", target.f.Name(), got)
				}
				w.kept = append(w.kept, target)
				for len(w.kept) > 4 {
					w.drop(t, w.r.IntN(len(w.kept)))
				}
				if t.Failed() {
					return
				}
			}
			t.Logf("%d pairs, in which %d blocks were changed", pairs, differing)
			if differing < pairs {
				t.Errorf("%d blocks changed in %d pairs: the test shows little", differing, pairs)
			}
		})
	}
}

// image is a file that is written at random, with the version of each block: 0
// reads as zeros and was never written, or not since.
type image struct {
	dir         string
	hint        uint32
	f, direct   *os.File
	r           *rand.Rand
	version     []int
	last, names int
	kept        []cut
	page        []byte
}

// cut is a reflink of an image with its versions.
type cut struct {
	f       *os.File
	version []int
	data    []byte
}

func newImage(t *testing.T, dir string, size int64, hint uint32, r *rand.Rand) *image {
	t.Helper()
	f := newFile(t, dir, 0)
	if err := extent.Prepare(f, hint); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	direct, err := os.OpenFile(f.Name(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	page, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { direct.Close(); _ = unix.Munmap(page) })
	return &image{dir: dir, hint: hint, f: f, direct: direct, r: r, version: make([]int, size/block), page: page}
}

// write does one thing to the image.
func (w *image) write(t *testing.T) {
	t.Helper()
	first := w.r.IntN(len(w.version))
	n := min(1+w.r.IntN(40), len(w.version)-first)
	off, length := int64(first)*block, int64(n)*block
	version := 0
	data := w.page[:length]
	fill := func() {
		w.last++
		version = w.last
		for i := range data {
			data[i] = byte(w.r.Uint32())
		}
	}
	fallocate := func(mode uint32) error {
		return unix.Fallocate(int(w.f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, length)
	}
	var err error
	switch w.r.IntN(8) {
	case 0, 1:
		fill()
		_, err = w.f.WriteAt(data, off)
	case 2, 3:
		fill()
		_, err = w.direct.WriteAt(data, off)
	case 4: // zeros that were written are data
		fill()
		clear(data)
		_, err = w.direct.WriteAt(data, off)
	case 5:
		err = fallocate(unix.FALLOC_FL_PUNCH_HOLE)
	case 6:
		err = fallocate(unix.FALLOC_FL_ZERO_RANGE)
	case 7: // changes nothing
		if err = fallocate(0); err == nil {
			_, err = w.f.ReadAt(w.page, 0) // what is read is not written
		}
		n = 0
	}
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		w.version[first+i] = version
	}
}

func (w *image) cut(t *testing.T) cut {
	t.Helper()
	w.names++
	f, err := os.Create(filepath.Join(w.dir, fmt.Sprintf("cut-%d", w.names)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := extent.Prepare(f, w.hint); err != nil {
		t.Fatal(err)
	}
	if err := extent.Clone(f, w.f); err != nil {
		t.Fatal(err)
	}
	return cut{f, slices.Clone(w.version), read(t, f)}
}

// drop deletes a reflink, so that its blocks can be used again.
func (w *image) drop(t *testing.T, i int) {
	t.Helper()
	f := w.kept[i].f
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	f.Close()
	w.kept = slices.Delete(w.kept, i, i+1)
}

// mustBeExact compares what Changed finds with the versions, and with the
// bytes, and gives the number of blocks that changed.
func (w *image) mustBeExact(t *testing.T, base, target cut) (n int) {
	t.Helper()
	size := int64(len(w.version)) * block
	var want []extent.Range
	for i := range w.version {
		off := i * block
		if base.version[i] == target.version[i] {
			if !bytes.Equal(base.data[off:off+block], target.data[off:off+block]) {
				t.Fatalf("block %d: the test is wrong: it has version %d twice", i, base.version[i])
			}
			continue
		}
		n++
		if k := len(want); k > 0 && want[k-1].Offset+want[k-1].Length == int64(off) {
			want[k-1].Length += block
			continue
		}
		want = append(want, extent.Range{Offset: int64(off), Length: block})
	}
	got := collect(t, extent.Map(ctx, base.f, 0, size), extent.Map(ctx, target.f, 0, size), 0, size)
	if !slices.Equal(got, want) {
		t.Errorf("from %s to %s: %v, want %v", base.f.Name(), target.f.Name(), got, want)
	}
	return n
}
