//go:build integration

package integration

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/tests/harness"
)

// A read-only publication is read-only to root, and a writable one beside it
// stays writable; what the writer brings to the disk, the reader sees.
func TestNodeReadOnlyIsReadOnlyInTheKernel(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			v := nodeCreate(d, kind.name, kind)
			dataMust(t, v.stage())
			dataMust(t, v.publish())
			sum := dataFill(t, kind.file(d.Target(v.name)), dataMiB)
			reader := dataPublish(t, d, kind.name+"-reader", v.name, v.id, kind.capability, true)
			dataMustHold(t, kind.file(reader), dataMiB, sum)
			nodeMustBeReadOnly(t, kind, reader)
			dataMustHold(t, kind.file(reader), dataMiB, sum)

			sum = dataFill(t, kind.file(d.Target(v.name)), dataMiB)
			nodeMustHoldOnDisk(t, kind.file(reader), sum)
			if n, want := len(dataLoops(t, dataPool(d))), map[bool]int{true: 2, false: 1}[kind.isBlock()]; n != want {
				t.Errorf("%d loop devices, want %d", n, want)
			}
			dataUnpublish(t, d, kind.name+"-reader", v.id)
			if n := len(dataLoops(t, dataPool(d))); n != 1 {
				t.Errorf("%d loop devices after the reader has gone, want 1", n)
			}
			sum = dataFill(t, kind.file(d.Target(v.name)), dataMiB)
			d.Release(v.name, v.id)

			// Two readers and no writer.
			dataMust(t, v.stage())
			for _, name := range []string{"a", "b"} {
				target := dataPublish(t, d, kind.name+name, v.name, v.id, kind.capability, true)
				nodeMustBeReadOnly(t, kind, target)
				dataMustHold(t, kind.file(target), dataMiB, sum)
			}
			dataUnpublish(t, d, kind.name+"a", v.id)
			dataMustHold(t, kind.file(d.Target(kind.name+"b")), dataMiB, sum)
			dataUnpublish(t, d, kind.name+"b", v.id)
			dataMust(t, v.unstage())
			dataMustBeIdle(t, d, dataPool(d))
		})
	}
}

// The mode of a volume that nobody may write is enough; its publication need
// not say so again.
func TestNodeReaderOnlyModeIsReadOnlyInTheKernel(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	const mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			source := nodeCreate(d, kind.name, kind)
			sum := dataFill(t, kind.file(d.Use(source.name, source.id, kind.capability)), dataMiB)
			d.Release(source.name, source.id)
			capability := harness.Mount(kind.name, mode)
			if kind.isBlock() {
				capability = harness.Block(mode)
			}
			id := d.Create(kind.name+"-copy", 0, capability, harness.FromVolume(source.id)).GetVolumeId()
			target := d.Use(kind.name+"-copy", id, capability)
			dataMustHold(t, kind.file(target), dataMiB, sum)
			nodeMustBeReadOnly(t, kind, target)
			d.Release(kind.name+"-copy", id)
		})
	}
}

// nodeMustBeReadOnly tries to write as root in every way that there is.
func nodeMustBeReadOnly(t *testing.T, kind dataKind, target string) {
	t.Helper()
	if kind.isBlock() {
		nodeDeviceMustBeReadOnly(t, target)
		return
	}
	file := kind.file(target)
	for what, err := range map[string]error{
		"mkdir":    os.Mkdir(filepath.Join(target, "new"), 0o700),
		"create":   os.WriteFile(filepath.Join(target, "new"), nil, 0o600),
		"write":    os.WriteFile(file, []byte("x"), 0),
		"truncate": os.Truncate(file, 0),
		"chmod":    os.Chmod(file, 0o644),
		"rename":   os.Rename(file, file+"2"),
		"remove":   os.Remove(file),
		"setxattr": unix.Setxattr(file, "user.x", []byte("x"), 0),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s of %s read-only gives %v, want EROFS", what, kind.name, err)
		}
	}
}

func nodeDeviceMustBeReadOnly(t *testing.T, device string) {
	t.Helper()
	f, err := os.Open(device)
	dataMust(t, err)
	defer f.Close()
	for range 2 {
		if readOnly, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err != nil || readOnly&0xff != 1 {
			t.Errorf("BLKROGET gives %d (%v), want 1", readOnly, err)
		}
		for _, flag := range []int{0, unix.O_DIRECT, unix.O_EXCL} {
			w, err := os.OpenFile(device, os.O_RDWR|flag, 0)
			if err != nil {
				continue // refused at once
			}
			page, mapErr := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			dataMust(t, mapErr)
			if _, err = w.WriteAt(page, 0); err == nil {
				err = w.Sync()
			}
			dataMust(t, unix.Munmap(page))
			w.Close()
			if err == nil {
				t.Errorf("a write with flag %#x succeeds", flag)
			}
		}
		whole := [2]uint64{0, 4096}
		for what, request := range map[string]uintptr{"BLKDISCARD": unix.BLKDISCARD, "BLKZEROOUT": unix.BLKZEROOUT} {
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&whole))); errno == 0 {
				t.Errorf("%s succeeds", what)
			}
		}
		// Root may ask for the flag to go; the device is none the more
		// writable for it.
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, 0)
	}
}

// nodeMustHoldOnDisk reads past the page cache, which a second device of the
// same volume has of its own.
func nodeMustHoldOnDisk(t *testing.T, name string, sum uint32) {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	dataMust(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	dataMustHold(t, name, dataMiB, sum)
}
