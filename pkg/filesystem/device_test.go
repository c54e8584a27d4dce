//go:build integration

package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	mib = int64(1) << 20
	gib = mib << 10

	roomy = 384 * mib // every filesystem can do all it can at this size
)

// eachType runs a test of what holds for every filesystem.
func eachType(t *testing.T, test func(t *testing.T, fs Type)) {
	for _, fs := range []Type{Ext4, XFS, Btrfs} {
		t.Run(string(fs), func(t *testing.T) { test(t, fs) })
	}
}

// soon ends when the test has no business taking longer.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // an emulated machine is slow
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantWords(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("%q is missing in %q", word, text)
		}
	}
}

func wantError(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("error %q is not %q", err, kind)
	}
	wantWords(t, err.Error(), words...)
}

// device is a loop device over an image file.
type device struct {
	path   string
	number uint64
	image  string
}

// newDevice is one that reads as zeros.
func newDevice(t *testing.T, size int64) device {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, size))
	return attachImage(t, image, 0)
}

// attachImage makes a loop device as volumes have it, and takes it away after
// the test.
func attachImage(t *testing.T, image string, flags uint32) device {
	t.Helper()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	control, err := os.Open("/dev/loop-control")
	must(t, err)
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		must(t, err)
		path := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		defer loop.Close()
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
			Fd:   uint32(file.Fd()),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO | flags},
		})
		if errors.Is(err, unix.EBUSY) {
			continue // another test was faster
		}
		must(t, err)
		t.Cleanup(func() { detach(t, path) })
		number, err := deviceNumber(path)
		must(t, err)
		return device{path, number, image}
	}
}

func detach(t *testing.T, path string) {
	loop, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		defer loop.Close()
		err = unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0)
	}
	if err != nil {
		t.Errorf("detach %s: %v", path, err)
	}
}

// made is a new device with a filesystem.
func made(t *testing.T, fs Type, size int64, options ...string) device {
	t.Helper()
	d := newDevice(t, size)
	must(t, Make(soon(t), d.path, fs, options))
	return d
}

// resize gives the image and its device another size.
func (d device) resize(t *testing.T, size int64) {
	t.Helper()
	must(t, os.Truncate(d.image, size))
	loop, err := os.OpenFile(d.path, os.O_RDWR, 0)
	must(t, err)
	defer loop.Close()
	must(t, unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY, 0))
}

// copy attaches a copy of the image as it is now, however live it is.
func (d device) copy(t *testing.T) device {
	t.Helper()
	image := filepath.Join(t.TempDir(), "copy")
	tool(t, "cp", "--sparse=always", d.image, image)
	return attachImage(t, image, 0)
}

// idle tells whether nothing holds the device.
func (d device) idle() bool {
	fd, err := unix.Open(d.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// mounted mounts a device on a new directory until the test ends.
func (d device) mounted(t *testing.T, fs Type, options ...string) string {
	t.Helper()
	target := t.TempDir()
	must(t, Mount(soon(t), d.path, target, fs, options, false))
	unmountAfter(t, target)
	return target
}

// unmountAfter unmounts all that is at target when the test ends.
func unmountAfter(t *testing.T, target string) {
	t.Cleanup(func() {
		for {
			if _, err := mountID(target); errors.Is(err, ErrNotMounted) {
				return
			}
			if err := Unmount(soon(t), target); err != nil {
				t.Error(err)
				return
			}
		}
	})
}

// wantSound checks the filesystem on a device that is not mounted, without
// repairing anything.
func (d device) wantSound(t *testing.T, fs Type) {
	t.Helper()
	switch fs {
	case Ext4:
		tool(t, "e2fsck", "-f", "-n", d.path)
	case XFS:
		tool(t, "xfs_repair", "-n", d.path)
	case Btrfs:
		tool(t, "btrfs", "check", "--readonly", d.path)
	}
}

func tool(t *testing.T, name string, arguments ...string) string {
	t.Helper()
	out, err := exec.Command(name, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(arguments, " "), err, out)
	}
	return string(out)
}

// write makes a file that is on stable storage.
func write(t *testing.T, path, text string) {
	t.Helper()
	file, err := os.Create(path)
	must(t, err)
	defer file.Close()
	_, err = file.WriteString(text)
	must(t, err)
	must(t, file.Sync())
}

func wantFile(t *testing.T, path, text string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != text {
		t.Errorf("%s has %.40q (%v), want %.40q", path, got, err, text)
	}
}
