package loop

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Options says how a device is attached. The zero value is a writable device
// with the block size that the kernel chooses.
type Options struct {
	ReadOnly  bool   // the kernel refuses writes, whoever asks
	BlockSize int    // logical block size in bytes, a power of two of at least 512; 0 is the kernel's choice
	NoDiscard bool   // the device refuses to discard, so that a preallocated file stays so; see Attach
	Label     string // shown by losetup(8) as the file's name; at most 63 bytes, and of no effect
}

// errTaken says that a free number was no longer free, or no longer there.
var errTaken = errors.New("taken by another process")

// Attach binds file to a free loop device, with direct I/O if the file's
// filesystem can do that with this block size: Device.DirectIO says so. The
// device stays when file is closed and when the process ends. On failure no
// device is left behind.
//
// A file that was opened for reading alone needs Options.ReadOnly. One file may
// have several devices; what is written through one is seen through another
// once it is flushed, but a page that the other has cached is not read again.
//
// With NoDiscard the device refuses discards, and from Linux 5.19 on also the
// punching of holes, which fallocate(2) on a block device otherwise passes
// down. Zeroing works, by writing.
func Attach(file *os.File, o Options) (Device, error) {
	if len(o.Label) >= unix.LO_NAME_SIZE {
		return Device{}, fmt.Errorf("the label %q is longer than %d bytes", o.Label, unix.LO_NAME_SIZE-1)
	}
	// The kernel would attach it read-only, without a word.
	mode, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return Device{}, fmt.Errorf("ask how %s is open: %w", file.Name(), err)
	}
	if mode&unix.O_ACCMODE == unix.O_RDONLY && !o.ReadOnly {
		return Device{}, fmt.Errorf("%s is open for reading only, so its device must be read-only", file.Name())
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return Device{}, err
	}
	defer control.Close()

	// Between being told a free number and taking it, others may take it. Each
	// time somebody got on, so this ends soon; the limit is for a host where
	// the number cannot be had for another reason.
	const limit = 10 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(rand.N(5 * time.Millisecond)) {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Device{}, fmt.Errorf("find a free loop device: %w", err)
		}
		var d Device
		if !o.NoDiscard && refusesDiscard(n) {
			err = fmt.Errorf("loop%d refuses discards for good: %w", n, errTaken)
			_ = remove(control, n) // fails only if somebody has taken it
		} else {
			d, err = attach(n, file, o)
		}
		if !errors.Is(err, errTaken) {
			return d, err
		}
		if time.Now().After(deadline) {
			return Device{}, fmt.Errorf("no free loop device in %s: %w", limit, err)
		}
	}
}

func attach(n int, file *os.File, o Options) (_ Device, err error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(path, mode, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return Device{}, fmt.Errorf("%w: %w", errTaken, err) // removed meanwhile
	}
	if err != nil {
		return Device{}, err
	}
	defer f.Close()

	config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: uint32(o.BlockSize)}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:], o.Label)
	if o.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if o.NoDiscard {
		// The limit can only be set on a device that exists. Should this
		// process die before it is, the device goes with it.
		config.Info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	err = unix.IoctlLoopConfigure(int(f.Fd()), &config)
	if errors.Is(err, unix.EBUSY) {
		return Device{}, fmt.Errorf("%s: %w", path, errTaken)
	}
	if err != nil {
		return Device{}, fmt.Errorf("bind %s to %s: %w", path, file.Name(), err)
	}
	defer func() {
		if err != nil {
			// It was told to nobody, so let it vanish with the last close,
			// which is the one above unless something probes the device.
			err = errors.Join(err, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0))
		}
	}()

	d, info, err := describe(f)
	if err != nil {
		return Device{}, err
	}
	dev, inode, err := identity(file)
	if err != nil {
		return Device{}, err
	}
	if d.BackingDev != dev || d.BackingInode != inode {
		return Device{}, fmt.Errorf("the kernel knows %s as another file below %s, so that it could not be found again", file.Name(), path)
	}
	if o.NoDiscard {
		if err := refuseDiscard(n); err != nil {
			return Device{}, err
		}
		if err := keep(f, info); err != nil {
			return Device{}, err
		}
	}
	return d, nil
}

// refuseDiscard makes device n refuse discards, by the limit in sysfs
// (Documentation/ABI/stable/sysfs-block).
func refuseDiscard(n int) error {
	if err := os.WriteFile(queue(n, "discard_max_bytes"), []byte("0"), 0); err != nil {
		return err
	}
	limit, err := readLimit(n, "discard_max_bytes")
	if err != nil {
		return err
	}
	if limit != 0 {
		return fmt.Errorf("loop%d goes on to discard up to %d bytes at once", n, limit)
	}
	return nil
}

// refusesDiscard tells whether refuseDiscard was done to device n. The kernel
// keeps that when the device is detached, for whoever has the number next; and
// since Linux 6.9 it cannot be undone, because a limit of 0 also makes the
// granularity 0, of which no other limit is a multiple. Only a new device in
// its place forgets it: see remove.
func refusesDiscard(n int) bool {
	limit, err := readLimit(n, "discard_max_bytes")
	if err != nil || limit != 0 {
		return false
	}
	able, err := readLimit(n, "discard_max_hw_bytes")
	return err == nil && able != 0
}

// remove removes device n (LOOP_CTL_REMOVE), which the kernel refuses with
// EBUSY if it is bound or open. Who needs the number next makes it anew.
func remove(control *os.File, n int) error {
	if err := unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, n); err != nil {
		return fmt.Errorf("remove loop%d: %w", n, err)
	}
	return nil
}

func readLimit(n int, name string) (uint64, error) {
	text, err := os.ReadFile(queue(n, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 64)
}

func queue(n int, name string) string {
	return fmt.Sprintf("/sys/block/loop%d/queue/%s", n, name)
}
