package filesystem

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openMount opens the root directory of what is mounted at path. It is
// ErrNotMounted where path is only a directory: what is done to a volume must
// not hit the node's own filesystem because the volume was unmounted.
func openMount(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var stat unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &stat)
	if err == nil && stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		err = ErrNotMounted
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Requests of ioctl(2) that golang.org/x/sys/unix lacks, with the header of the
// kernel that they are from. They are the same on amd64, arm64 and every other
// architecture whose _IOC_WRITE is 1.
const (
	fiFreeze = 0xc0045877 // linux/fs.h: FIFREEZE _IOWR('X', 119, int)
	fiThaw   = 0xc0045878 // linux/fs.h: FITHAW _IOWR('X', 120, int)

	ext4Resize  = 0x40086610 // uapi/linux/ext4.h: EXT4_IOC_RESIZE_FS _IOW('f', 16, __u64)
	xfsGeometry = 0x80705864 // fs/xfs/libxfs/xfs_fs.h: XFS_IOC_FSGEOMETRY_V1 _IOR('X', 100, struct xfs_fsop_geom_v1)
	xfsGrow     = 0x4010586e // fs/xfs/libxfs/xfs_fs.h: XFS_IOC_FSGROWFSDATA _IOW('X', 110, struct xfs_growfs_data)
	btrfsResize = 0x50009403 // uapi/linux/btrfs.h: BTRFS_IOC_RESIZE _IOW(0x94, 3, struct btrfs_ioctl_vol_args)
)

// ioctl passes a pointer to a struct, or nil. The result is 0 but for a few
// requests.
func ioctl[T any](fd int, request uint, argument *T) (int, error) {
	for {
		result, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(argument)))
		switch errno {
		case 0:
			return int(result), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("ioctl: %w", errno)
		}
	}
}
