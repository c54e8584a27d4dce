package filesystem

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestWithinReturnsWhatTheCallDoes(t *testing.T) {
	got, err := within(t.Context(), "ask", func() (int, error) { return 42, nil }, nil)
	if got != 42 || err != nil {
		t.Error(got, err)
	}
	failed := errors.New("failed")
	_, err = within(t.Context(), "ask", func() (int, error) { return 0, failed }, nil)
	if !errors.Is(err, failed) || err.Error() != "ask: failed" {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = within(ended, "ask", func() (int, error) { t.Error("called"); return 0, nil }, nil)
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWithinUndoesWhatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var undone atomic.Int32
		_, err := within(ctx, "wait", func() (int, error) { time.Sleep(time.Minute); return 42, nil }, func(n int) { undone.Store(int32(n)) })
		if !errors.Is(err, context.DeadlineExceeded) || undone.Load() != 0 {
			t.Error(err, undone.Load())
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if undone.Load() != 42 {
			t.Error("not undone")
		}
	})
}

func TestWithinDoesTheSameThingOnlyOnceAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran atomic.Int32
		call := func() (int, error) {
			ran.Add(1)
			time.Sleep(time.Hour)
			return 0, nil
		}
		// A wedged call, asked for once a minute by one who waits ten seconds.
		for range 30 {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_, err := within(ctx, "wedged", call, nil)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "wedged: ") {
				t.Fatal(err)
			}
			if _, err := within(t.Context(), "other", func() (int, error) { return 0, nil }, nil); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Second)
		}
		if n := ran.Load(); n != 1 {
			t.Errorf("%d at a time", n)
		}
		// One who waits long enough gets an answer of its own.
		if _, err := within(t.Context(), "wedged", call, nil); err != nil || ran.Load() != 2 {
			t.Errorf("%v, %d in all", err, ran.Load())
		}
	})
}
