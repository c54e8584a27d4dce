//go:build integration

package loop_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/loop"
)

const MiB = 1 << 20

func TestADeviceIsFoundByItsFileOnEachFilesystem(t *testing.T) {
	for _, fs := range []string{"host", "ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			dir := t.TempDir()
			if fs != "host" {
				dir = mountImage(t, fs, 512)
			}
			file := newFile(t, filepath.Join(dir, "data"), 64*MiB)
			other := newFile(t, filepath.Join(dir, "other"), 64*MiB)
			attach(t, other, loop.Options{})
			expectFound(t, file)

			d := attach(t, file, loop.Options{})
			expectFound(t, file, d)
			if got, err := loop.Get(d.Number); err != nil || got != d {
				t.Errorf("Get: %+v, %v; want %+v", got, err, d)
			}
			if err := d.Check(); err != nil {
				t.Error(err)
			}
			if st := stat(t, file); d.BackingDev != st.Dev || d.BackingInode != st.Ino {
				t.Errorf("backing %d:%d, but stat says %d:%d", d.BackingDev, d.BackingInode, st.Dev, st.Ino)
			}
			node := open(t, d.Path, os.O_RDONLY)
			if rdev := stat(t, node).Rdev; d.Number != rdev {
				t.Errorf("number %d, but %s is %d", d.Number, d.Path, rdev)
			}
			node.Close()
			if !d.DirectIO || sysfs(t, d, "loop/dio") != "1" {
				t.Errorf("no direct I/O on %s", fs)
			}

			// The inode counts, not the name.
			if err := os.Rename(file.Name(), file.Name()+".renamed"); err != nil {
				t.Fatal(err)
			}
			expectFound(t, file, d)
			if err := os.Remove(file.Name() + ".renamed"); err != nil {
				t.Fatal(err)
			}
			expectFound(t, file, d)

			detach(t, d)
			expectFound(t, file)
		})
	}
}

// A disk that failed must not take the devices of other disks away.
func TestAFailedFilesystemBehindOneDeviceDoesNotHideOthers(t *testing.T) {
	dead, err := os.Create(filepath.Join(mountImage(t, "xfs", 512), "dead"))
	if err != nil {
		t.Fatal(err)
	}
	if err := dead.Truncate(MiB); err != nil {
		t.Fatal(err)
	}
	lost := attach(t, dead, loop.Options{})
	t.Cleanup(func() { // not with Detach, which can prove nothing here
		node, err := os.Open(lost.Path)
		if err == nil {
			err = errors.Join(unix.IoctlSetInt(int(node.Fd()), unix.LOOP_CLR_FD, 0), node.Close(), dead.Close())
		}
		if err != nil {
			t.Error(err)
		}
	})
	alive := newFile(t, "", MiB)
	d := attach(t, alive, loop.Options{})

	const goingDown = 0x8004587d // XFS_IOC_GOINGDOWN, xfs_fs.h
	noLogFlush := uint32(2)      // XFS_FSOP_GOING_FLAGS_NOLOGFLUSH
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dead.Fd(), goingDown, uintptr(unsafe.Pointer(&noLogFlush))); errno != 0 {
		t.Fatal(errno)
	}
	expectFound(t, alive, d)
	if found, err := loop.Find(dead); err == nil {
		t.Errorf("nothing can be said of a file that cannot be asked, and %+v is", found)
	}
}

func TestGetOfWhatIsNotAttachedIsErrDetached(t *testing.T) {
	file := newFile(t, "", MiB)
	d := attach(t, file, loop.Options{})
	detach(t, d)
	// Another test may have the number by now.
	if got, err := loop.Get(d.Number); err == nil && got.BackingInode == d.BackingInode || err != nil && !errors.Is(err, loop.ErrDetached) {
		t.Errorf("Get: %+v, %v; want ErrDetached", got, err)
	}
	if _, err := loop.Get(unix.Mkdev(7, 1<<20-1)); !errors.Is(err, loop.ErrDetached) {
		t.Errorf("Get of a number that no device has: %v; want ErrDetached", err)
	}
	if _, err := loop.Get(stat(t, file).Dev); err == nil || errors.Is(err, loop.ErrDetached) {
		t.Errorf("Get of the disk below: %v; want an error of its own", err)
	}
}

func TestWhatIsWrittenToTheDeviceIsInTheFileAfterDetach(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{})
	data := random(16 * MiB)
	w := open(t, d.Path, os.O_WRONLY)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	w.Close()
	detach(t, d)
	if got := read(t, file); !bytes.Equal(got, data) {
		t.Error("the file has other bytes than were written")
	}
}

func TestFlushBringsCachedWritesToTheFile(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{})
	data := random(16 * MiB)
	w := open(t, d.Path, os.O_WRONLY) // stays open: a close of the last descriptor flushes, too
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, file); !bytes.Equal(got, data) {
		t.Error("the file has other bytes than were written")
	}
}

func TestAFailedBackgroundWriteIsReported(t *testing.T) {
	for name, flush := range map[string]func(loop.Device) error{
		"Flush":  loop.Device.Flush,
		"Detach": func(d loop.Device) error { return d.Detach(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := mountImage(t, "ext4", 16)
			file := newFile(t, filepath.Join(dir, "data"), 64*MiB)
			d := attach(t, file, loop.Options{})
			w := open(t, d.Path, os.O_WRONLY)
			if _, err := w.Write(random(32 * MiB)); err != nil {
				t.Fatal(err)
			}
			w.Close()
			if err := flush(d); err == nil || errors.Is(err, loop.ErrBusy) {
				t.Errorf("%v; want an I/O error: twice the disk's size was written", err)
			}
			expectFound(t, file, d)
		})
	}
}

func TestOneFileMayHaveAWritableAndAReadOnlyDevice(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	ro := attach(t, file, loop.Options{ReadOnly: true})
	rw := attach(t, file, loop.Options{})
	if !ro.ReadOnly || rw.ReadOnly {
		t.Errorf("read-only: %v and %v", ro.ReadOnly, rw.ReadOnly)
	}
	expectFound(t, file, rw, ro)

	data := random(MiB)
	w := open(t, ro.Path, os.O_WRONLY)
	if _, err := w.Write(data); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the read-only device: %v; want EPERM", err)
	}
	w.Close()
	if _, err := open(t, rw.Path, os.O_WRONLY).Write(data); err != nil {
		t.Fatal(err)
	}
	for _, d := range []loop.Device{rw, ro} {
		if err := d.Flush(); err != nil {
			t.Error(err)
		}
	}
	got := make([]byte, len(data))
	r := open(t, ro.Path, os.O_RDONLY)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read through the read-only device: %v, equal: %v", err, bytes.Equal(got, data))
	}
	r.Close()
	detach(t, ro)
	expectFound(t, file, rw)
}

func TestAReadOnlyDeviceRefusesWritesEvenWhenTheBlockLayerIsToldOtherwise(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{ReadOnly: true})
	if err := unix.IoctlSetPointerInt(int(open(t, d.Path, os.O_RDONLY).Fd()), unix.BLKROSET, 0); err != nil {
		t.Fatal(err)
	}
	if w, err := os.OpenFile(d.Path, os.O_WRONLY, 0); err == nil {
		_, _ = w.Write(random(MiB))
		_ = w.Sync()
		w.Close()
	}
	if got := read(t, file); !bytes.Equal(got, make([]byte, 16*MiB)) {
		t.Error("the file was written to")
	}
}

func TestAFileOpenForReadingIsNotAttachedWritable(t *testing.T) {
	file := open(t, newFile(t, "", MiB).Name(), os.O_RDONLY)
	if _, err := loop.Attach(file, loop.Options{}); err == nil {
		t.Error("it was attached")
	}
	expectFound(t, file)
	if d := attach(t, file, loop.Options{ReadOnly: true}); !d.ReadOnly {
		t.Error("the device is writable")
	}
}

func TestRefreshFollowsTheFilesSize(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{})
	for _, size := range []int64{16 * MiB, 64 * MiB} {
		if err := file.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if err := d.Refresh(); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Size(); err != nil || got != size {
			t.Errorf("size %d, %v; want %d", got, err, size)
		}
	}
}

func TestBlockSizeIsTheDevices(t *testing.T) {
	for _, size := range []int{512, 4096} {
		d := attach(t, newFile(t, "", MiB), loop.Options{BlockSize: size})
		if got := sysfs(t, d, "queue/logical_block_size"); got != fmt.Sprint(size) {
			t.Errorf("logical block size %s; want %d", got, size)
		}
	}
	if _, err := loop.Attach(newFile(t, "", MiB), loop.Options{BlockSize: 1000}); err == nil {
		t.Error("a block size of 1000 was accepted")
	}
}

// A disk with sectors of 4096 bytes cannot do direct I/O of 512.
func TestDirectIOIsWhatTheKernelDoesNotWhatWasAsked(t *testing.T) {
	disk := attach(t, newFile(t, "", 512*MiB), loop.Options{BlockSize: 4096})
	dir := mountDevice(t, "ext4", disk.Path)
	for size, want := range map[int]bool{512: false, 4096: true} {
		d := attach(t, newFile(t, filepath.Join(dir, fmt.Sprint(size)), MiB), loop.Options{BlockSize: size})
		if d.DirectIO != want || sysfs(t, d, "loop/dio") == "1" != want {
			t.Errorf("block size %d: DirectIO %v, and sysfs says %s; want %v", size, d.DirectIO, sysfs(t, d, "loop/dio"), want)
		}
	}
}

func TestTheLabelIsShown(t *testing.T) {
	d := attach(t, newFile(t, "", MiB), loop.Options{Label: "a volume"})
	info, err := unix.IoctlLoopGetStatus64(int(open(t, d.Path, os.O_RDONLY).Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if got := unix.ByteSliceToString(info.File_name[:]); got != "a volume" {
		t.Errorf("label %q", got)
	}
}

func TestDetachOfAMountedDeviceIsErrBusyAndTheMountGoesOn(t *testing.T) {
	file := newFile(t, "", 64*MiB)
	d := attach(t, file, loop.Options{})
	dir := mountDevice(t, "ext4", d.Path)
	expectBusy(t, d)

	data := random(8 * MiB)
	name := filepath.Join(dir, "data")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the mount does not work any more: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	expectFound(t, file, d) // the last close did not detach it
	detach(t, d)
}

func TestDetachOfAnOpenDeviceIsErrBusyAndItStaysAfterTheClose(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{})
	user := open(t, d.Path, os.O_RDWR)
	expectBusy(t, d)

	if _, err := user.Write(random(MiB)); err != nil {
		t.Error(err)
	}
	if err := user.Sync(); err != nil {
		t.Error(err)
	}
	user.Close()
	expectFound(t, file, d)
	detach(t, d)
}

func TestDetachWaitsForWhoeverOnlyLooks(t *testing.T) {
	for name, flags := range map[string]int{"udev": os.O_RDONLY, "mkfs": os.O_RDWR | unix.O_EXCL} {
		t.Run(name, func(t *testing.T) {
			d := attach(t, newFile(t, "", 16*MiB), loop.Options{})
			f := open(t, d.Path, flags)
			time.AfterFunc(200*time.Millisecond, func() { f.Close() })
			detach(t, d)
		})
	}
}

func TestDetachWaitsNoLongerThanItsContext(t *testing.T) {
	d := attach(t, newFile(t, "", 16*MiB), loop.Options{})
	f := open(t, d.Path, os.O_RDONLY)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	begun := time.Now()
	err := d.Detach(ctx)
	if !errors.Is(err, loop.ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v; want ErrBusy and the context's error", err)
	}
	if took := time.Since(begun); took > 500*time.Millisecond {
		t.Errorf("took %s", took)
	}
	f.Close()
}

// Whoever writes to the device and closes it may do so at any instant of a
// Detach: what the kernel took is in the file.
func TestNothingWrittenWhileDetachRunsIsLost(t *testing.T) {
	for range 40 {
		file := newFile(t, "", 64*MiB)
		d := attach(t, file, loop.Options{})
		w := open(t, d.Path, os.O_WRONLY)
		written := make(chan uint64)
		go func() {
			var n uint64
			block := make([]byte, MiB)
			for end := time.Now().Add(rand.N(60 * time.Millisecond)); time.Now().Before(end); {
				binary.NativeEndian.PutUint64(block, n+1)
				if _, err := w.WriteAt(block, int64(n%64)*MiB); err != nil {
					t.Errorf("write of an open device failed: %v", err)
					break
				}
				n++
			}
			w.Close()
			written <- n
		}()
		detach(t, d)
		n := <-written
		if n == 0 {
			continue
		}
		got := make([]byte, 8)
		if _, err := file.ReadAt(got, int64((n-1)%64)*MiB); err != nil {
			t.Fatal(err)
		}
		if binary.NativeEndian.Uint64(got) != n {
			t.Fatalf("the last of %d writes is not in the file", n)
		}
	}
}

func TestAStaleDeviceIsNeverActedOn(t *testing.T) {
	stale := attach(t, newFile(t, "", MiB), loop.Options{})
	detach(t, stale)

	// The same node now belongs to another file.
	file := newFile(t, "", 2*MiB)
	now := attach(t, file, loop.Options{})
	stale.Path, stale.Number = now.Path, now.Number

	if err := file.Truncate(4 * MiB); err != nil {
		t.Fatal(err)
	}
	_, sizeErr := stale.Size()
	for what, err := range map[string]error{
		"Check":   stale.Check(),
		"Size":    sizeErr,
		"Flush":   stale.Flush(),
		"Refresh": stale.Refresh(),
		"Detach":  stale.Detach(context.Background()),
	} {
		if !errors.Is(err, loop.ErrDetached) {
			t.Errorf("%s: %v; want ErrDetached", what, err)
		}
	}
	expectFound(t, file, now)
	if size, err := now.Size(); err != nil || size != 2*MiB {
		t.Errorf("the other's size became %d, %v", size, err)
	}
}

func TestDetachOfWhatIsDetachedIsErrDetached(t *testing.T) {
	d := attach(t, newFile(t, "", MiB), loop.Options{})
	detach(t, d)
	if err := d.Detach(context.Background()); !errors.Is(err, loop.ErrDetached) {
		t.Errorf("%v; want ErrDetached", err)
	}
}

func TestTheFilesystemBelowCanBeUnmountedRightAfterDetach(t *testing.T) {
	dir := mountImage(t, "ext4", 64)
	file, err := os.Create(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(file, loop.Options{})
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("unmount below an attached device: %v; want EBUSY", err)
	}
	detach(t, d)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount: %v", err)
	}
}

func TestRefreshTakesBackAForeignDetachOfADeviceInUse(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	d := attach(t, file, loop.Options{})
	user, foreign := open(t, d.Path, os.O_RDWR), open(t, d.Path, os.O_RDONLY)
	if err := unix.IoctlSetInt(int(foreign.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		t.Fatal(err)
	}
	if sysfs(t, d, "loop/autoclear") != "1" {
		t.Fatal("losetup -d of a device in use no longer sets the mark")
	}
	if err := d.Refresh(); err != nil {
		t.Fatal(err)
	}
	foreign.Close()
	user.Close()
	expectFound(t, file, d)
}

func TestNoDiscardKeepsWhatIsAllocated(t *testing.T) {
	for _, c := range []struct {
		noDiscard bool
		want      int64 // bytes that stay allocated of 16 MiB
	}{{false, 0}, {true, 16 * MiB}} {
		for what, punch := range map[string]func(fd int) error{
			"discard": func(fd int) error { return ioctlRange(fd, unix.BLKDISCARD, 0, 16*MiB) },
			"punch hole": func(fd int) error {
				return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 16*MiB)
			},
		} {
			t.Run(fmt.Sprintf("%s, NoDiscard %v", what, c.noDiscard), func(t *testing.T) {
				file := newFile(t, "", 16*MiB)
				if err := unix.Fallocate(int(file.Fd()), 0, 0, 16*MiB); err != nil {
					t.Fatal(err)
				}
				d := attach(t, file, loop.Options{NoDiscard: c.noDiscard})
				if sysfs(t, d, "loop/autoclear") != "0" {
					t.Error("the device would vanish on its last close")
				}
				err := punch(int(open(t, d.Path, os.O_RDWR).Fd()))
				if c.noDiscard != errors.Is(err, unix.EOPNOTSUPP) {
					t.Errorf("the kernel says %v", err)
				}
				if got := stat(t, file).Blocks * 512; got != c.want {
					t.Errorf("%d bytes are allocated; want %d", got, c.want)
				}
			})
		}
	}
}

func TestADeviceWithNoDiscardCanBeZeroed(t *testing.T) {
	file := newFile(t, "", 16*MiB)
	if _, err := file.Write(random(16 * MiB)); err != nil {
		t.Fatal(err)
	}
	d := attach(t, file, loop.Options{NoDiscard: true})
	w := open(t, d.Path, os.O_RDWR)
	if err := ioctlRange(int(w.Fd()), unix.BLKZEROOUT, 0, 16*MiB); err != nil {
		t.Fatal(err)
	}
	w.Close()
	detach(t, d)
	if got := read(t, file); !bytes.Equal(got, make([]byte, 16*MiB)) {
		t.Error("it does not read as zeros")
	}
}

// The kernel keeps the limit with the number, and knows no way to lift it.
func TestNoDiscardIsNotInheritedByTheNumbersNextUser(t *testing.T) {
	for _, properly := range []bool{true, false} {
		d := attach(t, newFile(t, "", MiB), loop.Options{NoDiscard: true})
		if properly {
			detach(t, d)
		} else {
			f := open(t, d.Path, os.O_RDONLY)
			if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		for range 8 {
			next := attach(t, newFile(t, "", MiB), loop.Options{})
			if got := sysfs(t, next, "queue/discard_max_bytes"); got == "0" {
				t.Errorf("%s refuses discards; detached by this package: %v", next.Path, properly)
			}
		}
	}
}

func TestManyFilesAreAttachedAtOnce(t *testing.T) {
	const n = 32
	dir := t.TempDir()
	var all sync.WaitGroup
	devices := make([]loop.Device, n)
	for i := range n {
		file := newFile(t, filepath.Join(dir, fmt.Sprint(i)), 4*MiB)
		all.Go(func() {
			d, err := loop.Attach(file, loop.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			devices[i] = d
			expectFound(t, file, d)
		})
	}
	all.Wait()
	numbers := map[uint64]bool{}
	for _, d := range devices {
		numbers[d.Number] = true
	}
	if len(numbers) != n {
		t.Errorf("%d files have %d devices", n, len(numbers))
	}
	for _, d := range devices {
		all.Go(func() {
			if err := d.Detach(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// attach attaches file for the length of the test.
func attach(t *testing.T, file *os.File, o loop.Options) loop.Device {
	t.Helper()
	d, err := loop.Attach(file, o)
	if err != nil {
		t.Fatal(err)
	}
	return d // newFile takes care that it goes
}

func detach(t *testing.T, d loop.Device) {
	t.Helper()
	if err := d.Detach(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// newFile makes a sparse file, and sees in the end that no device is left on
// it.
func newFile(t *testing.T, name string, size int64) *os.File {
	t.Helper()
	if name == "" {
		name = filepath.Join(t.TempDir(), "data")
	}
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	again, err := os.Open(name) // survives a test that closes or removes its file
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		devices, err := loop.Find(again)
		if err != nil {
			t.Error(err)
		}
		for _, d := range devices {
			if err := d.Detach(context.Background()); err != nil {
				t.Error(err)
			}
		}
		again.Close()
		file.Close()
	})
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return file
}

// mountImage mounts a new filesystem of so many MiB for the length of the test.
func mountImage(t *testing.T, fs string, size int64) string {
	t.Helper()
	return mountDevice(t, fs, attach(t, newFile(t, "", size*MiB), loop.Options{}).Path)
}

func mountDevice(t *testing.T, fs, path string) string {
	t.Helper()
	if out, err := exec.Command("mkfs."+fs, path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v\n%s", fs, err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(path, dir, fs, 0, ""); err != nil {
		t.Fatalf("mount %s: %v", path, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: the test did it
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func read(t *testing.T, file *os.File) []byte {
	t.Helper()
	data, err := io.ReadAll(io.NewSectionReader(file, 0, stat(t, file).Size))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func stat(t *testing.T, file *os.File) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func sysfs(t *testing.T, d loop.Device, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func expectFound(t *testing.T, file *os.File, want ...loop.Device) {
	t.Helper()
	got, err := loop.Find(file)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("found %+v, %v; want %+v", got, err, want)
	}
}

func expectBusy(t *testing.T, d loop.Device) {
	t.Helper()
	if err := d.Detach(context.Background()); !errors.Is(err, loop.ErrBusy) {
		t.Errorf("Detach: %v; want ErrBusy", err)
	}
	if err := d.Check(); err != nil {
		t.Error(err)
	}
	if sysfs(t, d, "loop/autoclear") != "0" {
		t.Error("the device is marked to be detached on its last close")
	}
}

func random(n int) []byte {
	data := make([]byte, n)
	var seed [32]byte
	rand.NewChaCha8(seed).Read(data)
	return data
}

// ioctlRange is the form of BLKDISCARD and BLKZEROOUT (linux/fs.h).
func ioctlRange(fd int, request uint, off, n uint64) error {
	span := [2]uint64{off, n}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}

func TestAFileThatSomebodyHasOpenIsNotUnused(t *testing.T) {
	for _, fs := range []string{"host", "ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			dir := t.TempDir()
			if fs != "host" {
				dir = mountImage(t, fs, 512)
			}
			data := plainFile(t, dir)
			for _, mine := range []int{os.O_RDONLY, os.O_RDWR} {
				file := open(t, data, mine)
				expect := func(want bool, when string) {
					t.Helper()
					if got := loop.Unused(file); got != want {
						t.Errorf("%s: %v", when, got)
					}
				}
				expect(true, "open here alone")
				for _, theirs := range []int{os.O_RDONLY, os.O_RDWR} {
					other := open(t, file.Name(), theirs)
					expect(false, "open twice")
					other.Close()
					expect(true, "closed again")
					other = open(t, file.Name(), theirs)
					d := attach(t, other, loop.Options{ReadOnly: theirs == os.O_RDONLY})
					other.Close()
					expect(false, "attached")
					detach(t, d)
					expect(true, "detached")
				}
				file.Close()
			}
		})
	}
}

// plainFile makes a file that nobody has open.
func plainFile(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "plain")
	if err := os.WriteFile(path, make([]byte, MiB), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Who opens the file in the instant that it is asked about gets it, and is told
// in his turn that he is not alone.
func TestAskingWhetherAFileIsUnusedDisturbsNobody(t *testing.T) {
	path := plainFile(t, t.TempDir())
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			for range 2000 {
				f, err := os.Open(path)
				if err != nil {
					t.Error(err)
					return
				}
				loop.Unused(f)
				other, err := os.Open(path)
				if err != nil {
					t.Error(err)
					return
				}
				if loop.Unused(f) {
					t.Error("a file that is open twice is unused")
				}
				other.Close()
				f.Close()
			}
		})
	}
	work.Wait()
}
