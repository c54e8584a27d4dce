package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// sampleAge is how old the sizes of a shared filesystem may be. Our own changes
// do not alter the total; only what others write there does.
const sampleAge = time.Second

// freeingWait bounds how long a promise waits for the space of what was deleted
// before.
const freeingWait = 20 * time.Second

// sample is the last look at a filesystem that the pool shares with others.
type sample struct {
	mu     sync.Mutex
	taken  time.Time
	total  int64
	used   int64
	census census
}

// fsSizes are a filesystem's sizes in bytes.
type fsSizes struct {
	size      int64
	free      int64
	available int64 // to other than root: what ext4 holds back is not ours to take
	readOnly  bool
}

func statfs(root *os.Root) (fsSizes, error) {
	d, err := root.Open(".")
	if err != nil {
		return fsSizes{}, err
	}
	defer d.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.Fd()), &st); err != nil {
		return fsSizes{}, fmt.Errorf("statfs %s: %w", root.Name(), err)
	}
	unit := st.Frsize
	return fsSizes{
		size:      int64(st.Blocks) * unit,
		free:      int64(st.Bfree) * unit,
		available: int64(st.Bavail) * unit,
		readOnly:  st.Flags&unix.ST_RDONLY != 0,
	}, nil
}

// reach asks the pool's filesystem for its sizes. One that takes nothing, because
// it has failed or is read-only, is ErrUnavailable.
func (e *Engine) reach() (fsSizes, error) {
	st, err := statfs(e.root)
	if err == nil && st.readOnly {
		err = unix.EROFS
	}
	if err != nil {
		err = pool.Errorf(pool.ErrUnavailable, "pool %s takes nothing new: %w; see the kernel log, and mend its filesystem", e.info.Name, err)
	}
	return st, err
}

// sizes tells what the pool could hold in all, and what it holds in blocks now.
func (e *Engine) sizes() (total, used int64, err error) {
	if e.source.exclusive {
		st, err := e.reach()
		if err != nil {
			return 0, 0, err
		}
		overhead := e.identity.Overhead
		if e.identity.FilesystemSize > 0 && st.size > e.identity.FilesystemSize {
			overhead = int64(float64(overhead) / float64(e.identity.FilesystemSize) * float64(st.size))
		}
		return st.size - overhead, max(st.size-st.free-overhead, 0), nil
	}
	e.sample.mu.Lock()
	defer e.sample.mu.Unlock()
	if time.Since(e.sample.taken) < sampleAge {
		return e.sample.total, e.sample.used, nil
	}
	st, err := e.reach()
	if err != nil {
		return 0, 0, err
	}
	certain, used := e.occupied()
	e.sample.total, e.sample.used, e.sample.taken = st.available+certain, used, time.Now()
	return e.sample.total, e.sample.used, nil
}

// blocks tells the bytes in blocks of a file of the pool; none if it is gone.
func (e *Engine) blocks(name string) int64 {
	info, err := e.root.Lstat(name)
	if err != nil {
		return 0
	}
	return blocksOf(info)
}

func blocksOf(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok { // it always is, from package os on Linux
		return st.Blocks * 512
	}
	return 0
}

// reserve tells what of total is kept free.
func (e *Engine) reserve(total int64) int64 {
	return min(e.options.Reserve.Of(total), total)
}

// Capacity implements [pool.Engine].
func (e *Engine) Capacity(context.Context) (pool.Capacity, error) {
	total, used, err := e.sizes()
	if err != nil {
		return pool.Capacity{}, fmt.Errorf("capacity of pool %s: %w", e.info.Name, err)
	}
	reserve := e.reserve(total)
	thin, thick := e.ledger.available(total - reserve)
	return pool.Capacity{
		Total:       total,
		Reserve:     reserve,
		Provisioned: e.ledger.promised(),
		Used:        used,
		Available:   thin,
		Thick:       thick,
	}, nil
}

// promise takes n bytes of the pool's room for something new, for which what
// is a name in the error. While space of what was deleted is still being
// freed, it waits for that.
func (e *Engine) promise(ctx context.Context, n int64, kind pool.Provisioning, what string) error {
	deadline := time.NewTimer(freeingWait)
	defer deadline.Stop()
	for {
		total, _, err := e.sizes()
		if errors.Is(err, pool.ErrUnavailable) {
			// So that an orchestrator looks for room elsewhere.
			return pool.Errorf(pool.ErrNoSpace, "%w", err)
		}
		if err != nil {
			return err
		}
		usable := total - e.reserve(total)
		ok, freed := e.ledger.take(n, kind, usable)
		if ok {
			return nil
		}
		if freed != nil {
			select {
			case <-freed:
				continue
			case <-ctx.Done():
				return ctx.Err()
			case <-deadline.C:
			}
		}
		thin, thick := e.ledger.available(usable)
		room := thin
		if kind == pool.Thick {
			room = thick
		}
		return pool.Errorf(pool.ErrNoSpace, "pool %s has no room for %s: it needs %d bytes, %d of %d are left to promise (%d promised, %d in reserve)",
			e.info.Name, what, n, room, total, e.ledger.promised(), total-usable)
	}
}
