package extent

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Prepare makes f, an empty file, fit to be written at random and cloned:
//
//   - on XFS, blocks are allocated in units of hint bytes, a multiple of the
//     filesystem's block size, and so are the blocks that replace shared ones
//     (extsize and cowextsize in xfs_io(8)). That bounds the number of extents,
//     which is what [Clone] costs. hint 0 leaves both to XFS.
//   - on btrfs, data is overwritten in place while it is not shared, without
//     checksums (chattr(1) +C). Of two files to be cloned, both or none must be
//     so.
//   - elsewhere, nothing.
func Prepare(f *os.File, hint uint32) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("ask for the filesystem of %s: %w", f.Name(), err)
	}
	switch {
	case st.Type == unix.XFS_SUPER_MAGIC && hint != 0:
		return hintExtents(f, hint)
	case st.Type == unix.BTRFS_SUPER_MAGIC:
		return overwriteInPlace(f)
	}
	return nil
}

// fsxattr and the constants are struct fsxattr, FS_IOC_FSGETXATTR,
// FS_IOC_FSSETXATTR and FS_XFLAG_* of include/uapi/linux/fs.h; the encoding of
// the two requests is that of amd64, arm64, riscv64 and s390x.
type fsxattr struct {
	flags      uint32
	extsize    uint32
	nextents   uint32
	projid     uint32
	cowextsize uint32
	_          [8]byte
}

const (
	fsGetXattr = 0x801c581f
	fsSetXattr = 0x401c5820

	flagExtsize    = 0x00000800
	flagCowextsize = 0x00010000
)

func hintExtents(f *os.File, hint uint32) error {
	attr, err := getXattr(f)
	if err != nil {
		return fmt.Errorf("get the attributes of %s: %w", f.Name(), err)
	}
	attr.flags |= flagExtsize
	attr.extsize = hint
	if err := setXattr(f, attr); err != nil {
		return fmt.Errorf("set the extent size of %s to %d: %w", f.Name(), hint, err)
	}
	attr.flags |= flagCowextsize
	attr.cowextsize = hint
	// EINVAL: an XFS made without reflink, where nothing is ever shared.
	if err := setXattr(f, attr); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("set the copy-on-write extent size of %s to %d: %w", f.Name(), hint, err)
	}
	return nil
}

func getXattr(f *os.File) (fsxattr, error) {
	var attr fsxattr
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsGetXattr, uintptr(unsafe.Pointer(&attr)))
	if errno != 0 {
		return fsxattr{}, errno
	}
	return attr, nil
}

func setXattr(f *os.File, attr fsxattr) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsSetXattr, uintptr(unsafe.Pointer(&attr)))
	if errno != 0 {
		return errno
	}
	return nil
}

const nocow = 0x00800000 // FS_NOCOW_FL of include/uapi/linux/fs.h

func overwriteInPlace(f *os.File) error {
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return fmt.Errorf("get the flags of %s: %w", f.Name(), err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|nocow)); err != nil {
		return fmt.Errorf("turn copy-on-write of %s off: %w", f.Name(), err)
	}
	return nil
}
