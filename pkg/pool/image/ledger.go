package image

import (
	"sync"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// ledger keeps what a pool has promised, in bytes, so that no volume ever sees
// "no space" because of another. It does no I/O.
//
// A thin promise (a thin volume at its full size, a snapshot at what it may
// come to hold alone) may be given overcommit times over; a thick one (a thick
// volume, and what was deleted and is not freed yet) stands for real blocks and
// may not.
type ledger struct {
	overcommit float64

	mu          sync.Mutex
	thin, thick int64
	freeing     int           // deletions whose space is still being freed
	freed       chan struct{} // closed when one of them has ended
}

func newLedger(overcommit float64) *ledger {
	return &ledger{overcommit: overcommit, freed: make(chan struct{})}
}

// available tells how much more can be promised out of usable bytes.
func (l *ledger) available(usable int64) (thin, thick int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.availableLocked(usable)
}

func (l *ledger) availableLocked(usable int64) (thin, thick int64) {
	thin = int64(float64(usable-l.thick)*l.overcommit) - l.thin
	thick = usable - l.thick - int64(float64(l.thin)/l.overcommit)
	return max(thin, 0), max(thick, 0)
}

// take promises n of usable bytes if there is room for them. If there is none
// but space is being freed, freed is closed when there may be; else it is nil.
func (l *ledger) take(n int64, kind pool.Provisioning, usable int64) (ok bool, freed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room, thick := l.availableLocked(usable)
	if kind == pool.Thick {
		room = thick
	}
	if n > room {
		if l.freeing > 0 {
			return false, l.freed
		}
		return false, nil
	}
	l.addLocked(n, kind)
	return true, nil
}

// add promises n bytes whether there is room or not: for what exists.
func (l *ledger) add(n int64, kind pool.Provisioning) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addLocked(n, kind)
}

func (l *ledger) addLocked(n int64, kind pool.Provisioning) {
	if kind == pool.Thick {
		l.thick += n
		return
	}
	l.thin += n
}

// give takes a promise of n bytes back.
func (l *ledger) give(n int64, kind pool.Provisioning) {
	l.add(-n, kind)
}

// addFreeing promises the n bytes of something deleted until they are free.
func (l *ledger) addFreeing(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addLocked(n, pool.Thick)
	l.freeing++
}

// giveFreed takes such a promise back.
func (l *ledger) giveFreed(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addLocked(-n, pool.Thick)
	l.freeing--
	close(l.freed)
	l.freed = make(chan struct{})
}

// promised is the sum of all promises.
func (l *ledger) promised() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.thin + l.thick
}
