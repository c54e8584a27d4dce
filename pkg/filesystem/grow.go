package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Grow makes the filesystem that is mounted at mountpoint as large as its
// device, while it is in use. One that is so already is left alone; so is one
// that lacks less than the filesystem's own unit of space. A filesystem never
// shrinks. A read-only one is an error that says so.
func Grow(ctx context.Context, mountpoint string) error {
	_, err := within(ctx, "grow "+mountpoint, func() (struct{}, error) {
		fd, err := openMount(mountpoint)
		if err != nil {
			return struct{}{}, err
		}
		defer unix.Close(fd)
		var stat unix.Stat_t
		if err := unix.Fstat(fd, &stat); err != nil {
			return struct{}{}, err
		}
		log := followKernelLog(stat.Dev)
		err = growOpen(fd, stat.Dev)
		said := log.stop()
		if errors.Is(err, unix.EROFS) {
			err = fmt.Errorf("it is mounted read-only: %w", err)
		}
		if err != nil {
			err = fmt.Errorf("%w%s", err, said)
		}
		return struct{}{}, err
	}, nil)
	return err
}

// growOpen grows the filesystem that a file is on; device is the file's st_dev.
func growOpen(fd int, device uint64) error {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(fd, &stat); err != nil {
		return err
	}
	switch int64(stat.Type) {
	case unix.EXT4_SUPER_MAGIC:
		return growExt4(fd, device, uint64(stat.Bsize))
	case unix.XFS_SUPER_MAGIC:
		return growXFS(fd, device)
	case unix.BTRFS_SUPER_MAGIC:
		return growBtrfs(fd)
	}
	return fmt.Errorf("its type (%#x) cannot be grown", stat.Type)
}

// growExt4 asks the kernel only if there is something to do: it wants
// CAP_SYS_RESOURCE in any case.
func growExt4(fd int, device, blockSize uint64) error {
	size, err := deviceSize(device)
	if err != nil {
		return err
	}
	spans, err := spansExt4(device, size, blockSize)
	if err != nil || spans {
		return err
	}
	blocks := size / blockSize
	_, err = ioctl(fd, ext4Resize, &blocks)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w (it takes CAP_SYS_RESOURCE, and a filesystem in which the kernel found no errors)", err)
	}
	return err
}

// spansExt4 reads the superblock of a mounted ext4 from the page cache of its
// device, where the kernel has it and changes it.
func spansExt4(device, size, blockSize uint64) (bool, error) {
	f, err := os.Open("/dev/" + kernelName(device))
	if err != nil {
		return false, err
	}
	defer f.Close()
	head := make([]byte, 2048)
	if _, err := f.ReadAt(head, 0); err != nil {
		return false, err
	}
	info, ok := decodeExt4(head)
	if !ok {
		return false, fmt.Errorf("%s: %w", f.Name(), ErrNone)
	}
	return size-uint64(info.Size) < blockSize, nil
}

// leftOut is how much of a device resize2fs may leave out at its end, in bytes:
// a block group that would be little more than its own tables.
const leftOut = 16 << 20

// GrowsUnmounted reports whether GrowUnmounted has something to do: the
// filesystem on a device is smaller than that, and Grow could not help once it is
// mounted. That is ext4, in a process that lacks CAP_SYS_RESOURCE. Less than
// 16 MiB are not worth it.
func GrowsUnmounted(device string, t Type) (bool, error) {
	if t != Ext4 || mayGrowMounted() {
		return false, nil
	}
	number, err := deviceNumber(device)
	if err != nil {
		return false, err
	}
	size, err := deviceSize(number)
	if err != nil {
		return false, err
	}
	info, err := Probe(device)
	if err != nil {
		return false, err
	}
	return int64(size)-info.Size >= leftOut, nil
}

// GrowUnmounted makes the ext4 on a device that is not mounted as large as the
// device. CheckWhole must have found it sound just before; resize2fs insists. If it
// is cut off, by whatever, the filesystem may be one that Check takes for damaged,
// and is to be given to Repair before all else.
func GrowUnmounted(ctx context.Context, device string) error {
	return run(ctx, 0, "resize2fs", device)
}

// mayGrowMounted tells whether this process has CAP_SYS_RESOURCE
// (capabilities(7)), without which the kernel grows no ext4 that is mounted.
func mayGrowMounted() bool {
	const number = unix.CAP_SYS_RESOURCE
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[number/32].Effective&(1<<(number%32)) != 0
}

func growXFS(fd int, device uint64) error {
	size, err := deviceSize(device)
	if err != nil {
		return err
	}
	// struct xfs_fsop_geom_v1; the tail that is of no interest here is opaque.
	var now struct {
		blockSize, _, _, _, _, _, _, imaxpct uint32
		dataBlocks                           uint64
		_                                    [72]byte
	}
	if _, err := ioctl(fd, xfsGeometry, &now); err != nil {
		return err
	}
	// struct xfs_growfs_data
	want := struct {
		newBlocks uint64
		imaxpct   uint32 // also set by this call
		_         uint32
	}{newBlocks: size / uint64(now.blockSize), imaxpct: now.imaxpct}
	if want.newBlocks <= now.dataBlocks {
		return nil
	}
	_, err = ioctl(fd, xfsGrow, &want)
	return err
}

// growBtrfs grows the device with the ID 1, which is the only one there is
// after Make.
func growBtrfs(fd int) error {
	// struct btrfs_ioctl_vol_args
	want := struct {
		_    int64
		name [4088]byte
	}{}
	copy(want.name[:], "1:max")
	result, err := ioctl(fd, btrfsResize, &want)
	if err == nil && result != 0 {
		// enum btrfs_err_code: BTRFS_ERROR_DEV_EXCL_RUN_IN_PROGRESS
		err = fmt.Errorf("%w: a balance or another exclusive operation runs on it (code %d)", ErrBusy, result)
	}
	return err
}

// deviceSize is the size of a block device in bytes.
func deviceSize(number uint64) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(sysDevice(number), "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 54)
	return sectors * 512, err // always of 512: kernel documentation, ABI/stable/sysfs-block
}
