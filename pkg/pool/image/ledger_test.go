package image

import (
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func mustHave(t *testing.T, rule string, l *ledger, usable, wantThin, wantThick int64) {
	t.Helper()
	if thin, thick := l.available(usable); thin != wantThin || thick != wantThick {
		t.Errorf("%s: %d thin and %d thick are available, want %d and %d", rule, thin, thick, wantThin, wantThick)
	}
}

func mustTake(t *testing.T, l *ledger, n int64, kind pool.Provisioning, usable int64, want bool) {
	t.Helper()
	if ok, freed := l.take(n, kind, usable); ok != want || freed != nil {
		t.Errorf("take(%d, %s) of %d = %v, with freed %v; want %v", n, kind, usable, ok, freed, want)
	}
}

func TestAPromiseIsExactToTheByte(t *testing.T) {
	l := newLedger(1)
	mustHave(t, "empty", l, 1000, 1000, 1000)
	mustTake(t, l, 1001, pool.Thin, 1000, false)
	mustTake(t, l, 600, pool.Thin, 1000, true)
	mustHave(t, "after a thin one", l, 1000, 400, 400)
	mustTake(t, l, 401, pool.Thick, 1000, false)
	mustTake(t, l, 400, pool.Thick, 1000, true)
	mustHave(t, "full", l, 1000, 0, 0)
	mustTake(t, l, 1, pool.Thin, 1000, false)
	mustTake(t, l, 0, pool.Thin, 1000, true)
	l.give(600, pool.Thin)
	mustHave(t, "after the thin one is given back", l, 1000, 600, 600)
	if got := l.promised(); got != 400 {
		t.Errorf("%d are promised, want 400", got)
	}
}

func TestOvercommitConcernsThinPromisesOnly(t *testing.T) {
	l := newLedger(2.5)
	mustHave(t, "empty", l, 1000, 2500, 1000)
	mustTake(t, l, 1000, pool.Thin, 1000, true)
	mustHave(t, "a thin one takes its share of real room", l, 1000, 1500, 600)
	mustTake(t, l, 601, pool.Thick, 1000, false)
	mustTake(t, l, 600, pool.Thick, 1000, true)
	mustHave(t, "a thick one takes that much more of promised room", l, 1000, 0, 0)
	l.give(1000, pool.Thin)
	mustHave(t, "the thick one alone", l, 1000, 1000, 400)
}

func TestThereIsNeverLessThanNothing(t *testing.T) {
	l := newLedger(1)
	l.add(5000, pool.Thin) // found in the pool: it exists, room or not
	mustHave(t, "more is promised than there is", l, 1000, 0, 0)
	mustTake(t, l, 1, pool.Thin, 1000, false)
	l.give(5000, pool.Thin)
	l.add(5000, pool.Thick)
	mustHave(t, "more is thick than there is", l, 1000, 0, 0)
	l.give(5000, pool.Thick)
	mustHave(t, "it is gone", l, 1000, 1000, 1000)
	mustHave(t, "the disk has shrunk to nothing", l, 0, 0, 0)
	mustHave(t, "the reserve is larger than the disk", l, -10, 0, 0)
}

func TestWhatIsBeingFreedIsWaitedForByWhoeverLacksIt(t *testing.T) {
	l := newLedger(1)
	l.add(900, pool.Thin)
	l.give(900, pool.Thin) // deleted,
	l.addFreeing(900)      // and on its way to be freed
	mustHave(t, "its blocks are still taken", l, 1000, 100, 100)
	mustTake(t, l, 100, pool.Thin, 1000, true) // has room: does not wait
	ok, freed := l.take(500, pool.Thin, 1000)
	if ok || freed == nil {
		t.Fatalf("take = %v, %v; want a channel to wait on", ok, freed)
	}
	select {
	case <-freed:
		t.Fatal("nothing was freed yet")
	default:
	}
	var woken sync.WaitGroup
	for range 3 { // all that wait are woken
		woken.Go(func() { <-freed })
	}
	l.giveFreed(900)
	woken.Wait()
	mustTake(t, l, 500, pool.Thin, 1000, true)
	mustTake(t, l, 500, pool.Thin, 1000, false) // nothing is being freed now: no wait
}

func TestWhoeverWaitsIsWokenByEachDeletion(t *testing.T) {
	l := newLedger(1)
	l.addFreeing(500)
	l.addFreeing(500)
	for range 2 {
		ok, freed := l.take(1000, pool.Thin, 1000)
		if ok || freed == nil {
			t.Fatalf("take = %v, %v; want a channel to wait on", ok, freed)
		}
		l.giveFreed(500)
		<-freed
	}
	mustTake(t, l, 1000, pool.Thin, 1000, true)
}

func TestTheBooksBalanceWhateverTheOrder(t *testing.T) {
	const usable = 1 << 40
	for _, overcommit := range []float64{1, 1.5, 3} {
		var (
			l        = newLedger(overcommit)
			everyone sync.WaitGroup
		)
		for worker := range uint64(4) {
			random := rand.New(rand.NewPCG(worker, 1))
			everyone.Go(func() {
				kinds := []pool.Provisioning{pool.Thin, pool.Thick}
				for range 2000 {
					n, kind := random.Int64N(usable), kinds[random.IntN(2)]
					if ok, _ := l.take(n, kind, usable); ok {
						if promised := l.promised(); promised > int64(usable*overcommit) {
							t.Errorf("%d of %d are promised", promised, usable)
						}
						l.give(n, kind)
					}
				}
			})
		}
		everyone.Wait()
		if got := l.promised(); got != 0 {
			t.Errorf("overcommit %v: %d are still promised", overcommit, got)
		}
		mustHave(t, "all was given back", l, usable, int64(usable*overcommit), usable)
	}
}
