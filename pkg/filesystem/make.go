package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Make makes a filesystem on a device that reads as zeros, which the caller
// guarantees: nothing is discarded or zeroed first, so that thick volumes stay
// thick and the rest stays fast. When it returns nil, the filesystem is on
// stable storage.
//
// Options are words for the type's mkfs that [ValidateOptions] accepts; they
// win over those that Make gives itself. When ctx ends, mkfs is killed; what is
// then on the device is no filesystem.
func Make(ctx context.Context, device string, t Type, options []string) error {
	parsed, err := parseMkfsOptions(t, options)
	if err != nil {
		return err
	}
	tool := mkfs[t]
	if err := run(ctx, 0, tool.command, append(tool.arguments(parsed), device)...); err != nil {
		return err
	}
	info, err := Probe(device)
	if err != nil {
		return fmt.Errorf("after %s: %w", tool.command, err)
	}
	if info.Type != t {
		return fmt.Errorf("after %s: %s has %s, not %s", tool.command, device, info.Type, t)
	}
	_, err = within(ctx, "flush "+device, func() (struct{}, error) { return struct{}{}, flush(device) }, nil)
	return err
}

func flush(device string) error {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fsync(fd)
}

// Check makes a filesystem fit to be mounted. The device must not be mounted.
//
// An ext4 that the kernel marked as inconsistent is repaired by e2fsck -p,
// which does only what is safe to do unasked; ErrDamaged is what it leaves to a
// human. XFS, btrfs, and an ext4 that was merely not unmounted need nothing:
// the kernel replays their log at the mount.
func Check(ctx context.Context, device string, t Type) error {
	if t != Ext4 {
		return nil
	}
	info, err := Probe(device)
	if err != nil || !info.Errors {
		return err
	}
	return e2fsck(ctx, "-p", device)
}

// CheckWhole looks at all of an ext4, which takes its time, and not only at what
// the kernel marked. Otherwise it is as Check.
func CheckWhole(ctx context.Context, device string) error {
	return e2fsck(ctx, "-fp", device)
}

// Repair mends an ext4 that GrowUnmounted was cut off in, whatever it takes: what
// resize2fs leaves are tables that do not fit each other, and they can be made
// anew of the files' own, which it does not touch. (Beyond 1024 times its first
// size a filesystem has no room left for descriptors, and resize2fs moves blocks of
// files.) It is for nothing else: a filesystem that was damaged otherwise may lose
// files by it.
func Repair(ctx context.Context, device string) error {
	return e2fsck(ctx, "-fy", device)
}

func e2fsck(ctx context.Context, how, device string) error {
	// e2fsck(8), exit code: 1, errors corrected; 2, and reboot if it is the
	// root filesystem; 4, errors left uncorrected; the rest, it did not run.
	const corrected, uncorrected = 1 | 2, 4
	err := run(ctx, corrected, "e2fsck", how, device)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() && exit.ExitCode()&uncorrected != 0 {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}
