package cgroup

import (
	"fmt"
	"os"
	"sync"
)

// Limiter limits the I/O of pods. Its methods may be called at once, but for the
// same pod and device.
type Limiter struct {
	report func(error)

	mu      sync.Mutex
	watcher *watcher // of version 1; made when it is needed
}

// NewLimiter makes a limiter. It reports what goes wrong after a call: a
// container that began later and could not be limited.
func NewLimiter(report func(error)) *Limiter { return &Limiter{report: report} }

// Close ends the limiter. Limits stay in force, and containers that begin later
// have none under version 1.
func (l *Limiter) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watcher == nil {
		return nil
	}
	return l.watcher.close()
}

// Limit sets the limits of a pod, by its UID, on a block device (dev_t), for the
// containers that it has and those that it will have. It can fail with
// ErrUnsupported and ErrNoPod.
//
// With version 1 each container has the limits for itself, with version 2 all
// containers of the pod have them together.
func (l *Limiter) Limit(pod string, device uint64, limits Limits) error {
	g, err := find(pod)
	if err != nil {
		return err
	}
	if !g.unified && limits != (Limits{}) {
		w, err := l.watch()
		if err != nil {
			return err
		}
		if err := w.add(g.dir); err != nil {
			return fmt.Errorf("watching for new containers: %w", err)
		}
	}
	err = g.limit(device, limits)
	if _, goneErr := os.Stat(g.dir); err != nil && isGone(goneErr) {
		return fmt.Errorf("pod %s %w: it has ended", pod, ErrNoPod)
	}
	return err
}

func (l *Limiter) watch() (*watcher, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watcher != nil {
		return l.watcher, nil
	}
	w, err := newWatcher(l.report)
	if err != nil {
		return nil, fmt.Errorf("watching for new containers: %w", err)
	}
	l.watcher = w
	return w, nil
}
