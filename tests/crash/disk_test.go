//go:build integration

package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// disk is a disk with a filesystem on which the power can fail.
type disk struct {
	fsType string
	dir    string // where it is mounted
	device string
}

func newDisk(t *testing.T, fsType string) *disk {
	t.Helper()
	d := &disk{fsType: fsType, dir: harness.Filesystem(t, fsType, 6<<30)}
	mounts, err := filesystem.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.Path == d.dir {
			d.device = m.Source
		}
	}
	return d
}

// fail makes the power fail: the filesystem writes nothing any more from this
// instant on, neither its log nor what is in the page cache of its files. What
// is on filesystems on images in it has no way out either.
func (d *disk) fail() error { return shutDown(d.dir) }

// shutDown stops an XFS or ext4 at once: XFS_IOC_GOINGDOWN of xfs_fs.h and
// EXT4_IOC_SHUTDOWN of uapi/linux/ext4.h, which are the same.
func shutDown(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	const shutdown = 0x8004587d
	noLogFlush := uint32(2) // XFS_FSOP_GOING_FLAGS_NOLOGFLUSH, EXT4_GOING_FLAGS_NOLOGFLUSH
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&noLogFlush))); errno != 0 {
		return fmt.Errorf("shut down %s: %w", dir, errno)
	}
	return nil
}

// thawBelow thaws everything that is mounted below a directory.
func thawBelow(dir string) error {
	mounts, err := filesystem.Mounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Path, dir+"/") {
			_, _ = filesystem.Thaw(m.Path) // what has failed may say anything
		}
	}
	return nil
}

// comeBack takes away all that the kernel has of the disk, and mounts it again.
// No process may use it any more.
func (d *disk) comeBack(ctx context.Context) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		nothing, err := forget(d.dir)
		if err == nil && nothing {
			if err = unix.Unmount(d.dir, 0); err == nil {
				break
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the kernel goes on holding what was lost below %s: %w", d.dir, err)
		}
	}
	return filesystem.Mount(ctx, d.device, d.dir, filesystem.Type(d.fsType), nil, false)
}

// sync brings everything on the disk to stable storage: what a test has written
// and wants to be there.
func (d *disk) sync() error {
	f, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// forget undoes the mounts and devices below a directory, whatever they say of
// what they could not write, and tells if there were none.
func forget(dir string) (nothing bool, err error) {
	nothing = true
	mounts, err := filesystem.Mounts()
	if err != nil {
		return false, err
	}
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m.Path, dir+"/") {
			nothing = false
			_, _ = filesystem.Thaw(m.Path) // or it would keep its device
			err = errors.Join(err, unix.Unmount(m.Path, 0))
		}
	}
	backings, globErr := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if globErr != nil {
		return false, globErr
	}
	for _, b := range backings {
		if of, err := os.ReadFile(b); err != nil || !strings.HasPrefix(string(of), dir+"/") {
			continue
		}
		nothing = false
		if f, openErr := os.Open(filepath.Join("/dev", strings.Split(b, "/")[3])); openErr == nil {
			err = errors.Join(err, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0))
			f.Close()
		}
	}
	return nothing, err
}
