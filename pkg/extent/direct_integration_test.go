//go:build integration

package extent_test

import (
	"bytes"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
)

// What is written past the page cache and what is written through it is read both
// ways, whatever its alignment and wherever that is possible.
func TestDirectReadsAndWritesAsTheFileDoes(t *testing.T) {
	test := func(t *testing.T, _, dir string) {
		f := newFile(t, dir, 8*MiB)
		d, err := extent.OpenDirect(f, os.O_RDWR)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		want := make([]byte, 8*MiB)
		for _, at := range []struct{ offset, size, skip int }{
			{0, MiB, 0},
			{4 * MiB, 64 << 10, 0},
			{MiB - 4096, 8192, 0},  // over what is there
			{2*MiB + 512, 4096, 0}, // not at a sector
			{3 * MiB, 1000, 0},     // not whole sectors
			{5 * MiB, 8192, 1},     // not in memory at a sector
			{8*MiB - 4096, 4096, 0},
		} {
			data := memory(t, at.skip+at.size)[at.skip:]
			copy(data, random(at.size))
			copy(want[at.offset:], data)
			if n, err := d.WriteAt(data, int64(at.offset)); n != at.size || err != nil {
				t.Fatalf("writing %+v: %d, %v", at, n, err)
			}
			got := memory(t, at.skip+at.size)[at.skip:]
			if n, err := d.ReadAt(got, int64(at.offset)); n != at.size || err != nil || !bytes.Equal(got, data) {
				t.Fatalf("reading %+v: %d, %v, equal %t", at, n, err, bytes.Equal(got, data))
			}
		}
		if !bytes.Equal(read(t, f), want) {
			t.Error("the file differs")
		}
	}
	onEach(t, test)
	t.Run("tmpfs", func(t *testing.T) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil { // its file is open still
				t.Error(err)
			}
		}()
		test(t, "tmpfs", dir)
	})
}

// memory makes room for n bytes, for as long as a test takes.
func memory(t *testing.T, n int) []byte {
	t.Helper()
	parts, free, err := extent.Memory(1, (n+extent.Sector-1)/extent.Sector*extent.Sector)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(free)
	return parts[0][:n]
}

func TestMemoryIsOfSeparateAlignedParts(t *testing.T) {
	const n, size = 5, 3 * extent.Sector
	parts, free, err := extent.Memory(n, size)
	if err != nil {
		t.Fatal(err)
	}
	defer free()
	if len(parts) != n {
		t.Fatalf("%d parts, want %d", len(parts), n)
	}
	for i, part := range parts {
		if len(part) != size || cap(part) != size || uintptr(unsafe.Pointer(&part[0]))%extent.Sector != 0 {
			t.Errorf("part %d has %d bytes, room for %d, at %p", i, len(part), cap(part), part)
		}
		if !bytes.Equal(part, make([]byte, size)) {
			t.Errorf("part %d is not of zeros, or another lies in it", i)
		}
		copy(part, bytes.Repeat([]byte{byte(i + 1)}, size))
	}
}

// A copy leaves the page cache alone.
func TestDirectLeavesThePageCacheAlone(t *testing.T) {
	onEach(t, func(t *testing.T, _, dir string) {
		f := newFile(t, dir, 8*MiB)
		d, err := extent.OpenDirect(f, os.O_RDWR)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		data := memory(t, 4*MiB)
		copy(data, random(len(data)))
		if _, err := d.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if n := cached(t, f, 4*MiB); n != 0 {
			t.Errorf("%d pages are in memory", n)
		}
		if _, err := f.ReadAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if n := cached(t, f, 4*MiB); n == 0 {
			t.Error("no page is in memory that was read through it: the test sees nothing")
		}
	})
}

// cached tells how many of a file's first n bytes are in memory, in pages; see
// mincore(2).
func cached(t *testing.T, f *os.File, n int) (pages int) {
	t.Helper()
	mapped, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mapped) }()
	in := make([]byte, n/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(n), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, page := range in {
		pages += int(page & 1)
	}
	return pages
}
