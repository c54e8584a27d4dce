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

// patience is for how long Detach tries again when the device is in use: udev
// and blkid open a device for some milliseconds after each change of it, and an
// unmounted filesystem may let go of it a moment later.
const patience = time.Second

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
	deadline := time.Now().Add(patience)
	for {
		err := d.detach()
		if !errors.Is(err, ErrBusy) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", err, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
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
	// The second descriptor is why LOOP_CLR_FD only marks. LOOP_SET_STATUS64
	// would, too, but stops the device for some 15 ms to do it.
	second, _, err := d.open(os.O_RDONLY)
	if err != nil {
		return err
	}
	defer second.Close()
	if err := unix.IoctlSetInt(int(second.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		return fmt.Errorf("mark %s to be detached: %w", d.Path, err)
	}
	second.Close()
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
