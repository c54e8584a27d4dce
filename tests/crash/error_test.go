//go:build integration

package crash

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Every change fails once, in every operation: with "no space" what needs some,
// with an I/O error the rest. The call may then fail, in words that say why, or
// do without. It is repeated, and the world is as if nothing had been; what is
// left behind meanwhile is told of by the health, and gone after a start.
func TestAnErrorAtAnyPointIsToldAndLosesNothing(t *testing.T) {
	step := every(t)
	var mu sync.Mutex
	var table []covered
	t.Run("errors", func(t *testing.T) {
		for _, o := range operations {
			if o.call == nil || o.most > 0 || !o.sample && os.Getenv("ORLOP_CRASH_EVERY") == "" {
				continue
			}
			t.Run(o.name, func(t *testing.T) {
				t.Parallel()
				began := time.Now()
				c := o.coverErrors(t, step)
				c.took = time.Since(began)
				mu.Lock()
				defer mu.Unlock()
				table = append(table, c)
			})
		}
	})
	var text strings.Builder
	var sum covered
	for _, c := range table {
		fmt.Fprintf(&text, "%-57s %6d points %6d errors %6.1f s\n", c.name, c.points, c.repeated, c.took.Seconds())
		sum.points, sum.repeated = sum.points+c.points, sum.repeated+c.repeated
	}
	t.Logf("every %d. point:\n%s%-57s %6d points %6d errors", step, &text, "all", sum.points, sum.repeated)
}

// errorAt gives the error that a change can have; 0 is none that a disk causes.
func errorAt(change string) unix.Errno {
	word, _, _ := strings.Cut(change, " ")
	if strings.HasPrefix(change, "write /sys/") { // a pod's cgroup, which is no disk
		return 0
	}
	switch word {
	case "mkdir", "create", "rename", "write", "ftruncate", "fallocate", "FICLONE", "copy":
		return unix.ENOSPC
	case "wait", "start", "FITHAW": // a program, which is not the disk's; a thaw that fails is no thaw
		return 0
	}
	return unix.EIO
}

// mustBeTold tells whether the error of a change must be that of the call: what
// is not on stable storage, or was not made, is not OK. What could not be tidied
// up is the health's.
func mustBeTold(change string) bool {
	word, _, _ := strings.Cut(change, " ")
	switch word {
	case "mkdir", "create", "rename", "write", "ftruncate", "fallocate", "FICLONE", "copy", "sync":
		return true
	}
	return false
}

func (o operation) coverErrors(t *testing.T, step int) covered {
	t.Helper()
	w := newWorldFor(t, o)
	if o.once != nil {
		o.once(w)
	}
	w.at = "before"
	base := w.look()
	w.compare("before", base, base.lines)
	w.at = "without an error"
	o.prepared(w)
	tr := w.try(o, point{}, false)
	reference := w.look()
	w.compare("after the call", reference, reference.lines)
	o.finish(w, base.lines)
	c := covered{name: o.name, points: len(tr.changes)}
	for n := 1 + step/4; n <= len(tr.changes); n += step {
		errno := errorAt(tr.changes[n-1])
		if errno == 0 {
			continue
		}
		o.failing(w, point{n: n, errno: errno}, base.lines, reference.lines)
		c.repeated++
	}
	w.at = "end"
	o.tearDown(w)
	return c
}

// failing has a change fail, and repeats the call.
func (o operation) failing(w *world, at point, base, reference []string) {
	w.t.Helper()
	w.at = fmt.Sprintf("%s, change %d fails with %q", o.name, at.n, at.errno)
	o.prepared(w)
	tr, err := w.tried(o, at, false)
	if tr.lied {
		w.at = fmt.Sprintf("%s, change %d (%s) fails with %q", o.name, at.n, tr.changes[at.n-1], at.errno)
	}
	if err != nil {
		message, code := status.Convert(err).Message(), status.Code(err)
		if !strings.Contains(message, at.errno.Error()) || strings.Contains(message, "\n") {
			w.t.Errorf("%s: the error does not say so in one line: %q", w.at, message)
		}
		if code == codes.Unknown || at.errno == unix.ENOSPC && code != codes.ResourceExhausted {
			w.t.Errorf("%s: the code is %s: %s", w.at, code, message)
		}
		w.must(w.until(func(ctx context.Context) error { return o.call(ctx, w) }, codes.Aborted))
	} else if tr.lied && mustBeTold(tr.changes[at.n-1]) {
		w.t.Errorf("%s: the call is answered with OK", w.at)
	}
	w.Kill()
	w.Start()
	w.compare("after the call was repeated", w.look(), reference)
	o.finish(w, base)
}
