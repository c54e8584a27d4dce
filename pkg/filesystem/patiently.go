package filesystem

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// What is busy is tried again for about a second. The attempts are counted, and
// not the time, so that a machine that stands still for a second is not taken for
// a user.
const (
	attempts = 50
	pause    = 20 * time.Millisecond
)

// Patiently runs try until it is not ErrBusy. What only looks at a device may hold
// it for a moment: multipath, a partition tool. So may a child of this process
// between fork(2) and exec, which has open all that this process had then, devices
// and mounts, also what is closed here since.
func Patiently(ctx context.Context, try func() error) error {
	for n := 1; ; n++ {
		err := try()
		if !errors.Is(err, ErrBusy) || n == attempts {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; %w", err, ctx.Err())
		case <-time.After(pause):
		}
	}
}
