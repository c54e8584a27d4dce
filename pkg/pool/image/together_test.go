package image

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// What was done before a call of do is done before the run that it waits for, and
// its error is that run's.
func TestARunIsOfAllThatWasDoneBeforeItWasAskedFor(t *testing.T) {
	failure := errors.New("a failure")
	var changes, seen, runs, atOnce atomic.Int64
	all := together{run: func() error {
		if atOnce.Add(1) != 1 {
			t.Error("there are two runs at once")
		}
		defer atOnce.Add(-1)
		seen.Store(changes.Load())
		if runs.Add(1)%2 == 0 {
			return failure
		}
		return nil
	}}
	const callers, times = 16, 200
	var calls sync.WaitGroup
	var failed atomic.Int64
	for range callers {
		calls.Go(func() {
			for range times {
				mine := changes.Add(1)
				err := all.do()
				if err != nil {
					failed.Add(1)
				}
				if got := seen.Load(); got < mine {
					t.Errorf("the run was of %d changes; this was number %d", got, mine)
				}
			}
		})
	}
	calls.Wait()
	if n := runs.Load(); n == 0 || n > callers*times {
		t.Errorf("%d runs for %d calls", n, callers*times)
	}
	if n := failed.Load(); n == 0 || n == callers*times {
		t.Errorf("%d of %d calls have failed, and every other run did", n, callers*times)
	}
}

func TestThoseWhoAskWhileItRunsShareTheNextRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan struct{})
		var runs atomic.Int64
		all := together{run: func() error {
			if runs.Add(1) == 1 {
				<-goOn
				return nil
			}
			return errors.New("the second fails")
		}}
		go func() {
			if err := all.do(); err != nil {
				t.Errorf("the first run: %v", err)
			}
		}()
		synctest.Wait()
		for range 8 {
			go func() {
				if err := all.do(); err == nil {
					t.Error("the second run's error is not told")
				}
			}()
		}
		synctest.Wait()
		close(goOn)
		synctest.Wait()
		if n := runs.Load(); n != 2 {
			t.Errorf("there were %d runs for one call and eight during it", n)
		}
	})
}
