// Package filesystem makes, recognises, checks, mounts, grows and freezes ext4,
// XFS and btrfs on a block device, and tells from the kernel what is mounted
// where.
//
// It uses system calls wherever one does the work, and the distribution's own
// mkfs and e2fsck where none does. What may hang on a broken disk takes a
// context and gives up waiting when that ends, because a process in the middle
// of disk I/O cannot be killed.
//
// It never decides whether a device may be formatted: callers prove that. It
// never unmounts by force or lazily, never removes a file or a directory, and
// knows nothing of volumes. It needs Linux 5.12 or newer (mount_setattr(2)).
package filesystem

import (
	"errors"
	"fmt"
)

// The kinds of failure that callers tell apart. An ended context is
// context.DeadlineExceeded or context.Canceled.
var (
	ErrNone       = errors.New("no ext4, XFS or btrfs found")
	ErrOption     = errors.New("bad option")
	ErrBusy       = errors.New("busy")
	ErrFrozen     = errors.New("already frozen")
	ErrNotMounted = errors.New("not a mount point")
	ErrDamaged    = errors.New("filesystem is damaged")
)

// Type is a kind of filesystem, by the kernel's name for it.
type Type string

// The filesystems that this package knows.
const (
	Ext4  Type = "ext4"
	XFS   Type = "xfs"
	Btrfs Type = "btrfs"
)

// Parse reads the name of a filesystem as it stands in a request; the empty
// name is ext4. Any other name than the three is ErrOption.
func Parse(name string) (Type, error) {
	switch t := Type(name); t {
	case "":
		return Ext4, nil
	case Ext4, XFS, Btrfs:
		return t, nil
	}
	return "", fmt.Errorf("%w: unknown filesystem %q: it must be ext4, xfs or btrfs", ErrOption, name)
}

// MinSize is the size in bytes of the smallest device that Make accepts without
// options, and whose filesystem can then be mounted, filled with files, and
// grown. The numbers were found by trying (e2fsprogs 1.47, xfsprogs 6.1,
// btrfs-progs 6.2), and a test tries them again:
//
//   - ext4: mke2fs leaves out the journal below 2048 blocks of 4 KiB.
//   - XFS: mkfs.xfs says "Filesystem must be larger than 300MB" below 300 MiB.
//   - btrfs: mkfs.btrfs is content with 109 MiB, but the kernel resizes none of
//     less than 256 MiB, not even to the size that it has.
func (t Type) MinSize() int64 {
	switch t {
	case XFS:
		return 300 << 20
	case Btrfs:
		return 256 << 20
	default:
		return 8 << 20
	}
}
