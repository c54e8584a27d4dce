package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Detach tries again when the device is in use: udev and blkid open a device
// for some milliseconds after each change of it, and an unmounted filesystem
// may let go of it a moment later. The attempts are counted, and not the time,
// so that a machine that stands still for a second is not taken for a user.
const (
	attempts = 50
	pause    = 20 * time.Millisecond
)

// Detach takes the device away from the file. nil means proven: the device was
// not mounted and nobody else had it open, all that was written to it is in the
// file, and what was written before the call is on stable storage.
//
// If it is mounted, claimed by another driver, or open in any process,
// including a container's, Detach fails with ErrBusy after about a second, or
// when ctx ends; the device then is as it was, and stays. If d is not bound to
// its file any more, Detach fails with ErrDetached. If flushing fails, the
// device stays, and the failure is returned.
func (d Device) Detach(ctx context.Context) error {
	for n := 1; ; n++ {
		err := d.detach()
		if !errors.Is(err, ErrBusy) || n == attempts {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", err, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// detach is one attempt.
//
// LOOP_CLR_FD cannot be trusted with this. On a device that others have open it
// succeeds, and detaches later. On a device that only its caller has open it
// stops all I/O at once, and loses the pages that somebody wrote, and closed
// the device, after the caller's last flush. What the kernel does right is the
// last close of a device that is marked for it: under the lock that also
// guards open(2) it writes back what is left, and then detaches. So the mark is
// set, everything closed, and then looked whether that was the last close. If
// it was not, the mark is taken back.
func (d Device) detach() error {
	// The first descriptor proves that the number is still ours, and keeps it
	// so, before anything is done that its next owner could notice. Later it
	// makes LOOP_CLR_FD set the mark and no more, by being the second one.
	// (LOOP_SET_STATUS64 sets it, too, but stops the device for some 15 ms.)
	first, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer first.Close()
	// O_EXCL on a block device: nobody has claimed it, by a mount or otherwise,
	// and nobody can until it is closed (open(2)).
	exclusive, _, err := d.open(os.O_RDONLY | unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is mounted or claimed: %w", d.Path, ErrBusy)
	}
	if err != nil {
		return err
	}
	defer exclusive.Close()
	if err := exclusive.Sync(); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(int(first.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		return fmt.Errorf("mark %s to be detached: %w", d.Path, err)
	}
	first.Close()
	exclusive.Close()

	user, info, err := d.open(os.O_RDONLY)
	if errors.Is(err, ErrDetached) {
		d.forgetLimits()
		return nil
	}
	if err != nil {
		return fmt.Errorf("see whether %s is detached: %w", d.Path, err)
	}
	defer user.Close()
	if err := keep(user, info); err != nil {
		return err
	}
	return fmt.Errorf("%s is open in another process: %w", d.Path, ErrBusy)
}

// forgetLimits keeps Options.NoDiscard from the next user of the number, who
// may be another program than this. It is a courtesy that may fail: Attach
// looks again, and the kernel refuses if the number already has a next user.
func (d Device) forgetLimits() {
	n, _ := index(filepath.Base(d.Path))
	if !refusesDiscard(n) {
		return
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer control.Close()
	_ = remove(control, n)
}
