package filesystem

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// HarmedByThaw reports whether a filesystem is left read-only when a process is
// killed while it thaws it. A btrfs is: since Linux 6.2, and in stable kernels
// since then, its thaw reads the superblock to see whether somebody else wrote
// it, and takes for that a read that SIGKILL has ended ("super block on devid 1
// got modified unexpectedly", btrfs_unfreeze in fs/btrfs/super.c).
func (t Type) HarmedByThaw() bool { return t == Btrfs }

// Sync writes out what the filesystem that is mounted at mountpoint has in
// memory: syncfs(2). A freeze that comes soon after holds writers back for a
// short time only.
func Sync(ctx context.Context, mountpoint string) error {
	_, err := within(ctx, "sync "+mountpoint, func() (struct{}, error) {
		fd, err := openMount(mountpoint)
		if err != nil {
			return struct{}{}, err
		}
		defer unix.Close(fd)
		return struct{}{}, unix.Syncfs(fd)
	}, nil)
	return err
}

// Freeze makes the filesystem that is mounted at mountpoint consistent on its
// device, and holds back all that would write to it until thaw is called:
// FIFREEZE, ioctl_fsfreeze in fsfreeze(8). What can be written beforehand is,
// so that writers are held back for a short time only.
//
// One that is frozen already is ErrFrozen: somebody else will thaw it, or
// nobody, if a process died in between; then [Thaw] does. After an error
// nothing stays frozen: a freeze that succeeds after ctx ended is thawed at
// once. Until then it keeps the mount busy.
//
// thaw can be called more than once, and does not wait for any context, for it
// must not be given up. Until then the mount cannot be unmounted.
func Freeze(ctx context.Context, mountpoint string) (thaw func() error, err error) {
	fd, err := within(ctx, "freeze "+mountpoint, func() (int, error) { return freeze(ctx, mountpoint) }, func(fd int) {
		_ = thawAndClose(fd) // the caller has gone
	})
	if err != nil {
		return nil, err
	}
	return sync.OnceValue(func() error {
		if err := thawAndClose(fd); err != nil {
			return fmt.Errorf("thaw %s: %w", mountpoint, err)
		}
		return nil
	}), nil
}

func freeze(ctx context.Context, mountpoint string) (int, error) {
	fd, err := openMount(mountpoint)
	if err != nil {
		return -1, err
	}
	err = unix.Syncfs(fd)
	if err == nil {
		err = ctx.Err() // do not hold writers back for nobody
	}
	if err == nil {
		_, err = ioctl[struct{}](fd, fiFreeze, nil)
	}
	if errors.Is(err, unix.EBUSY) {
		err = ErrFrozen
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// thawAndClose takes one that somebody else has thawed meanwhile for thawed.
func thawAndClose(fd int) error {
	defer unix.Close(fd)
	if _, err := ioctl[struct{}](fd, fiThaw, nil); !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// Thaw lets go of a filesystem that was left frozen by a process that died, and
// tells whether it was.
func Thaw(mountpoint string) (wasFrozen bool, err error) {
	fd, err := openMount(mountpoint)
	if err == nil {
		defer unix.Close(fd)
		_, err = ioctl[struct{}](fd, fiThaw, nil)
	}
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("thaw %s: %w", mountpoint, err)
	}
	return true, nil
}
