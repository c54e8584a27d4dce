//go:build integration

package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// The power fails at every point of every operation: the driver is killed there,
// and in the same instant the disk that everything is on is shut down. Then
// comes what a machine does that starts again: the filesystem is mounted, the
// driver is started, the pods that were there are started, and the call is
// repeated.
//
// What was answered before must be there, with what was synced; the result of
// the call is whole or not there; there is no orphan, and the capacity is right
// to the byte. And where the call was answered, just before the power failed,
// the world is as it was.
func TestNothingIsLostWhereverThePowerFails(t *testing.T) {
	step := every(t)
	var mu sync.Mutex
	var table []covered
	for _, fsType := range []string{"xfs", "ext4"} {
		t.Run(fsType, func(t *testing.T) {
			for _, o := range operations {
				if !o.suits(fsType) || !o.sample && os.Getenv("ORLOP_CRASH_EVERY") == "" {
					continue
				}
				t.Run(o.name, func(t *testing.T) {
					if !o.single {
						t.Parallel()
					}
					began := time.Now()
					c := o.coverOutages(t, fsType, step)
					c.name, c.took = fsType+": "+o.name, time.Since(began)
					mu.Lock()
					defer mu.Unlock()
					table = append(table, c)
				})
			}
		})
	}
	slices.SortFunc(table, func(a, b covered) int { return strings.Compare(a.name, b.name) })
	var text strings.Builder
	fmt.Fprintf(&text, "%-60s %6s %8s %6s\n", "operation", "points", "outages", "s")
	var sum covered
	for _, c := range table {
		fmt.Fprintf(&text, "%-60s %6d %8d %6.1f\n", c.name, c.points, c.repeated, c.took.Seconds())
		sum.points, sum.repeated = sum.points+c.points, sum.repeated+c.repeated
	}
	fmt.Fprintf(&text, "%-60s %6d %8d", "all", sum.points, sum.repeated)
	t.Logf("every %d. point:\n%s", step, &text)
}

// suits tells whether an operation can be tried in a pool on a filesystem: ext4
// cannot share blocks, and what is copied instead is not where it can.
func (o operation) suits(fsType string) bool {
	switch fsType {
	case "ext4":
		return !o.shares
	default:
		return !o.copies
	}
}

// coverOutages tries an operation without an outage, then with one at each
// point.
func (o operation) coverOutages(t *testing.T, fsType string, step int) covered {
	t.Helper()
	w := newWorldOn(t, fsType, o.alone)
	if o.once != nil {
		o.once(w)
	}
	w.must(w.disk.sync()) // what is the test's own
	w.at = "before"
	base := w.look()
	w.compare("before", base, base.lines)

	w.at = "without an outage"
	o.prepared(w)
	tr := w.try(o, point{}, false)
	o.followed(w)
	reference := w.look()
	w.compare("after the call", reference, reference.lines)
	o.finish(w, base.lines)
	last := len(tr.changes)
	if o.most > 0 {
		last = min(last, o.most)
	}
	c := covered{points: last}
	on := func(n int) bool { return n <= last || step == 1 && o.most == 0 }
	for n := 1 + step/2; on(n) && o.outage(w, point{n: n}, base.lines, reference.lines); n += step {
		c.repeated++
	}
	if o.call != nil && o.most == 0 {
		c.points++
		if o.outage(w, point{n: tr.answered, answer: true}, base.lines, reference.lines) {
			c.repeated++
		}
		c.points++
		o.outageAfter(w, base.lines, reference.lines)
		c.repeated++
	}
	c.points = max(c.points, c.repeated)
	w.at = "end"
	o.tearDown(w)
	return c
}

// outage has the power fail at a point, and repeats the call. It tells whether
// the point was reached.
func (o operation) outage(w *world, at point, base, reference []string) bool {
	w.t.Helper()
	w.at = fmt.Sprintf("%s, power failed at point %d, at the answer %t", o.name, at.n, at.answer)
	o.prepared(w)
	at.fail = w.disk.fail
	tr := w.try(o, at, true)
	killed := tr.killed.Load()
	if killed {
		w.at = fmt.Sprintf("%s, power failed at change %d (%s)", o.name, len(tr.changes), tr.changes[len(tr.changes)-1])
		w.comeBack()
		w.revive(o)
		if o.call != nil {
			w.must(w.until(func(ctx context.Context) error { return o.call(ctx, w) }, codes.Aborted))
		}
	}
	o.followed(w)
	w.compare("after the call was repeated", w.look(), reference)
	o.finish(w, base)
	return killed
}

// followed does what comes after the call in any case.
func (o operation) followed(w *world) {
	w.t.Helper()
	if o.follow != nil {
		o.follow(w)
	}
}

// outageAfter has the power fail when the call was answered. What it made is
// there without it being repeated; but no mount and no device is.
func (o operation) outageAfter(w *world, base, reference []string) {
	w.t.Helper()
	w.at = o.name + ", power failed after the answer"
	o.prepared(w)
	w.must(w.until(func(ctx context.Context) error { return o.call(ctx, w) }, codes.Aborted))
	w.must(w.disk.fail())
	w.Kill()
	w.comeBack()
	w.revive(o)
	if o.fleeting {
		w.must(w.until(func(ctx context.Context) error { return o.call(ctx, w) }, codes.Aborted))
	}
	o.followed(w)
	w.compare("after the power failed", w.look(), reference)
	o.finish(w, base)
}

// comeBack starts the machine again. Nothing is mounted, nothing is attached,
// nobody is stopped; and what there is in the pool is whole.
func (w *world) comeBack() {
	w.t.Helper()
	if w.user != nil {
		_ = w.user.Close()
		w.user = nil
	}
	if w.pod != "" {
		w.thawPod()
	}
	w.must(thawBelow(w.Dir)) // or the writers, which have an error to meet, would wait
	for _, live := range w.live {
		_ = live.End()
	}
	w.must(w.disk.comeBack(w.t.Context()))
	w.forgetPaths()
	w.Start()
	s := seen{}
	s.problem(w.settle(func() bool { return false }))
	w.lookAtPool(&s)
	w.lookAtHealth(&s)
	w.compare("after the power came back", seen{problems: s.problems}, nil)
}

// forgetPaths removes the staging paths and targets that are empty directories, as
// the kubelet does when it finds them at its start: that one was removed need
// not be on stable storage.
func (w *world) forgetPaths() {
	w.t.Helper()
	for _, dir := range []string{"staging", "targets"} {
		entries, err := os.ReadDir(filepath.Join(w.Dir, dir))
		w.must(err)
		for _, entry := range entries {
			w.must(os.Remove(filepath.Join(w.Dir, dir, entry.Name())))
		}
	}
}

// revive does what the orchestrator does for the pods that it knows of.
func (w *world) revive(o operation) {
	w.t.Helper()
	for name, before := range w.live {
		w.use(name, w.kinds[name])
		w.holds(name, name)
		at, offset := w.log(name)
		last, err := records(at, offset)
		w.must(err)
		if safe := before.Safe.Load(); last < safe {
			w.t.Fatalf("%s: volume %s ends with record %d, %d were on stable storage", w.at, name, last, safe)
		}
		w.live[name] = write(w.t, at, offset, last)
	}
	if w.pod != "" {
		w.useInPod("raw")
		w.holds("raw", "raw")
	}
	if o.revive != nil {
		o.revive(w)
	}
}

// sync brings what a test has changed by hand to stable storage, where the power
// may fail.
func (w *world) sync() {
	w.t.Helper()
	if w.disk != nil {
		w.must(w.disk.sync())
	}
}
