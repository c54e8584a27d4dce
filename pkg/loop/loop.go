// Package loop makes block devices of files, with the kernel's loop driver
// (loop(4), drivers/block/loop.c) and direct I/O.
//
// It remembers nothing: what is attached is asked of the kernel each time. It
// runs no program, and it never mounts, formats or changes a byte of a file.
// It never acts on a device that is bound to another file than the caller
// means, and it never takes a device away from whoever still has it open.
package loop

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrBusy says that a device is mounted, or open in some process.
	ErrBusy = errors.New("in use")
	// ErrDetached says that a device is bound to nothing, or no longer to the
	// file that it was bound to.
	ErrDetached = errors.New("not attached")
	// ErrUnasked says that the kernel cannot tell what a device is bound to,
	// which it asks of the backing file's filesystem (loop_get_status in
	// drivers/block/loop.c): that one has failed.
	ErrUnasked = errors.New("the file behind the device cannot be asked")
)

// Device is a loop device as it was when the kernel was asked. It stays a valid
// argument for ever: each method first proves, on the descriptor that it works
// with, that the device is still bound to the same file, and otherwise fails
// with ErrDetached and does nothing. A number that the kernel gave to another
// file meanwhile is therefore never touched.
type Device struct {
	Path         string // in /dev
	Number       uint64 // dev_t, as in stat.Rdev
	ReadOnly     bool   // the kernel refuses writes
	DirectIO     bool   // false: the data passes the page cache twice
	BackingDev   uint64 // stat.Dev of the backing file
	BackingInode uint64 // stat.Ino of the backing file
}

// Find returns all devices that are bound to file, whatever name it has or had:
// the writable ones first, then by number. It asks every bound device on the
// host, which takes about 16 µs each; [Unused] proves in 2 µs that there is none,
// and a caller that remembers a Device may use [Device.Check].
//
// A device whose backing file cannot be asked, because its filesystem was shut
// down after an error or its server went away, is not bound to file if file can
// still be asked: what fails is the filesystem. Others' disasters are not ours.
func Find(file *os.File) ([]Device, error) {
	dev, inode, err := identity(file)
	if err != nil {
		return nil, err
	}
	names, err := bound()
	if err != nil {
		return nil, err
	}
	var found []Device
	for _, name := range names {
		f, d, _, err := open(name, os.O_RDONLY)
		if errors.Is(err, ErrDetached) {
			continue // between the listing and here
		}
		if errors.Is(err, ErrUnasked) {
			if _, _, askErr := identity(file); askErr == nil {
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		f.Close()
		if d.BackingDev == dev && d.BackingInode == inode {
			found = append(found, d)
		}
	}
	slices.SortFunc(found, func(a, b Device) int {
		if a.ReadOnly != b.ReadOnly {
			if b.ReadOnly {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Number, b.Number)
	})
	return found, nil
}

// Bound is a device as it was when all were asked.
type Bound struct {
	Device

	File string // the backing file's path, as the kernel has kept it; it adds " (deleted)" to one that was removed
}

// All returns all devices that are bound to a file. One whose file cannot be
// asked, as in [ErrUnasked], has no BackingDev and BackingInode.
func All() ([]Bound, error) {
	names, err := bound()
	if err != nil {
		return nil, err
	}
	all := make([]Bound, 0, len(names))
	for _, name := range names {
		file, err := os.ReadFile(filepath.Join("/sys/block", name, "loop/backing_file"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
			continue // detached meanwhile, as below
		}
		if err != nil {
			return nil, err
		}
		f, d, _, err := open(name, os.O_RDONLY)
		switch {
		case errors.Is(err, ErrDetached):
			continue
		case errors.Is(err, ErrUnasked):
			var st unix.Stat_t
			d.Path = filepath.Join("/dev", name)
			if err := unix.Stat(d.Path, &st); err != nil {
				return nil, err
			}
			d.Number = uint64(st.Rdev)
		case err != nil:
			return nil, err
		default:
			f.Close()
		}
		all = append(all, Bound{d, strings.TrimSuffix(string(file), "\n")})
	}
	return all, nil
}

// Get returns the device with the given dev_t, as in stat.Rdev of its node or
// stat.Dev of a file on it. It fails with ErrDetached if there is no such
// device or it is bound to nothing.
func Get(number uint64) (Device, error) {
	const folder = "/sys/dev/block" // sysfs(5): one link for each block device
	if _, err := os.Stat(folder); err != nil {
		return Device{}, err
	}
	id := fmt.Sprintf("%d:%d", unix.Major(number), unix.Minor(number))
	link, err := os.Readlink(filepath.Join(folder, id))
	if errors.Is(err, fs.ErrNotExist) {
		return Device{}, fmt.Errorf("block device %s: %w", id, ErrDetached)
	}
	if err != nil {
		return Device{}, err
	}
	name := filepath.Base(link)
	if _, ok := index(name); !ok {
		return Device{}, fmt.Errorf("block device %s is %s, not a loop device", id, name)
	}
	f, d, _, err := open(name, os.O_RDONLY)
	if err != nil {
		return Device{}, err
	}
	return d, f.Close()
}

// Check returns nil while d is bound to the same file, else ErrDetached. It
// costs one ioctl, so a Device that was remembered is a cheap hint.
func (d Device) Check() error {
	f, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	return f.Close()
}

// Size returns the device's size in bytes. It is the backing file's size as of
// the last Attach or Refresh, less what does not fill a sector of 512 bytes.
func (d Device) Size() (int64, error) {
	f, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// Refresh makes the device as large as the backing file is now. Whatever uses
// the device is told by the kernel and goes on.
//
// It also takes back a mark to detach on the last close, which a Detach that
// was killed halfway, or `losetup -d` on a device in use, leaves behind: such a
// device would disappear under its next user.
func (d Device) Refresh() error {
	f, info, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("take over the size of the file behind %s: %w", d.Path, err)
	}
	if info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0 {
		return keep(f, info)
	}
	return nil
}

// RefuseDiscard makes sure that the device refuses discards, as one attached
// with Options.NoDiscard does. On a kernel before Linux 6.9 a process that died
// at the wrong moment may have left one that does not.
func (d Device) RefuseDiscard() error {
	f, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	n, _ := index(filepath.Base(d.Path))
	if refusesDiscard(n) {
		return nil
	}
	return refuseDiscard(n)
}

// Flush brings what was written through the device's page cache to the backing
// file, and the file to stable storage. A direct reader of the file, and a
// reflink of it, see those bytes only then. A write that failed in the
// background is reported here, once.
func (d Device) Flush() error {
	f, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// open opens the device if it is still what d says.
func (d Device) open(flags int) (*os.File, *unix.LoopInfo64, error) {
	f, now, info, err := open(filepath.Base(d.Path), flags)
	if err != nil {
		return nil, nil, err
	}
	if now.Number != d.Number || now.BackingDev != d.BackingDev || now.BackingInode != d.BackingInode {
		f.Close()
		return nil, nil, fmt.Errorf("%s is bound to another file now: %w", d.Path, ErrDetached)
	}
	return f, info, nil
}

// open opens a loop device by its kernel name and asks what it is bound to. No
// detach takes effect while the descriptor is open.
func open(name string, flags int) (*os.File, Device, *unix.LoopInfo64, error) {
	f, err := os.OpenFile(filepath.Join("/dev", name), flags, 0)
	switch {
	case errors.Is(err, unix.ENXIO): // its last user is just closing it, or it is being removed
		return nil, Device{}, nil, fmt.Errorf("%s: %w", name, ErrDetached)
	case errors.Is(err, fs.ErrNotExist):
		// Without a node there may yet be a device, if /dev is not the
		// kernel's own. Taking that for detached could cost a volume.
		names, listErr := bound()
		if listErr == nil && !slices.Contains(names, name) {
			return nil, Device{}, nil, fmt.Errorf("%s: %w", name, ErrDetached)
		}
		return nil, Device{}, nil, errors.Join(err, listErr)
	case err != nil:
		return nil, Device{}, nil, err
	}
	d, info, err := describe(f)
	if err != nil {
		f.Close()
		return nil, Device{}, nil, err
	}
	return f, d, info, nil
}

// describe asks an open loop device what it is bound to (LOOP_GET_STATUS64).
func describe(f *os.File) (Device, *unix.LoopInfo64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Device{}, nil, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return Device{}, nil, fmt.Errorf("%s: %w", f.Name(), ErrDetached)
	}
	if err != nil {
		return Device{}, nil, fmt.Errorf("%w (%s): %w", ErrUnasked, f.Name(), err)
	}
	if n, _ := index(filepath.Base(f.Name())); n != int(info.Number) {
		return Device{}, nil, fmt.Errorf("%s is the node of another device, loop%d", f.Name(), info.Number)
	}
	return Device{
		Path:   f.Name(),
		Number: uint64(st.Rdev),
		// The kernel clears the flag of direct I/O when it cannot do it,
		// so these flags are what is, and not what was asked for.
		ReadOnly: info.Flags&unix.LO_FLAGS_READ_ONLY != 0,
		DirectIO: info.Flags&unix.LO_FLAGS_DIRECT_IO != 0,
		// Both come from the same getattr as stat(2), and the device is in
		// the encoding of stat.Dev (huge_encode_dev in kdev_t.h).
		BackingDev:   info.Device,
		BackingInode: info.Inode,
	}, info, nil
}

// keep takes the mark to detach on the last close back (LOOP_SET_STATUS64).
// Before Linux 6.9 the kernel then also lifts the limit of Options.NoDiscard
// (loop_config_discard in drivers/block/loop.c), so it is set again.
func keep(f *os.File, info *unix.LoopInfo64) error {
	n, _ := index(filepath.Base(f.Name()))
	refused := refusesDiscard(n)
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(int(f.Fd()), info); err != nil {
		return fmt.Errorf("%s would be detached on its last close, and the mark cannot be removed: %w", f.Name(), err)
	}
	if refused && !refusesDiscard(n) {
		return refuseDiscard(n)
	}
	return nil
}

// bound lists the kernel names of the loop devices that are bound to a file:
// those have a folder "loop" in sysfs.
func bound() ([]string, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, ok := index(e.Name()); !ok {
			continue
		}
		_, err := os.Stat(filepath.Join("/sys/block", e.Name(), "loop"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		names = append(names, e.Name())
	}
	return names, nil
}

// index returns 7 for "loop7"; false for all that is not a whole loop device.
func index(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, "loop")
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil && n >= 0
}

// identity returns what makes file the same file under any name.
func identity(file *os.File) (dev, inode uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", file.Name(), err)
	}
	return uint64(st.Dev), st.Ino, nil
}
