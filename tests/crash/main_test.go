//go:build integration

// Package crash kills the real driver at every point of every operation, and
// shows that nothing is lost and nothing is left.
//
// A point is a system call that changes something: a directory, a file, a loop
// device, a freeze, the mounts; and the start of a program, and its run. The
// driver, unmodified, is followed with ptrace(2) while it works, and killed as
// it is about to make the n-th such call, for every n from the first to the
// last, and once more when all is done and the answer is about to be sent. What
// lies between two such calls changes nothing that outlives the process.
//
// After each kill the driver is started again, and the orchestrator either
// repeats the call, or gives up and takes away what it asked for. In the first
// case the programs that the driver had started died with it, as in a
// container; in the second they live on. Then the world must be what it is when
// nobody crashes: the same files, lists, loop devices, mounts and paths, the
// capacity right to the byte, also after one more start; no filesystem frozen;
// the data in place; and the writer of a bystander unharmed. And when all is
// undone, nothing must be left. That all this would be seen is shown with faults
// that are planted, in the world and in the driver.
//
// A kill also comes while the kernel makes a change, which then is made, or is
// not, or in part.
//
// In these the power stays on: what the kernel has in memory outlives the driver.
// Other tests have the power fail at the same points, and after each answer:
// everything is on a disk whose filesystem is shut down in the instant of the
// kill, and mounted again.
//
// It takes long. The environment variable ORLOP_CRASH_EVERY says that every
// n-th point is tried; 1 is all of them. By default it is a number with which
// the package takes about two minutes on two cores, and the power fails in some
// operations only. ORLOP_CRASH_PATIENCE is how long the driver may take to be
// right again, 20s if it is not set.
package crash

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// The main thread stays with the main goroutine: it would not end with a
// goroutine that is locked to it, as a tracer must.
func init() { runtime.LockOSThread() } //nolint:gochecknoinits // later it may be on another thread

func TestMain(m *testing.M) { harness.Main(m) }

// everyDefault is ORLOP_CRASH_EVERY if it is not set.
const everyDefault = 12

func every(t *testing.T) int {
	t.Helper()
	text := os.Getenv("ORLOP_CRASH_EVERY")
	if text == "" {
		return everyDefault
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("ORLOP_CRASH_EVERY=%s is not a positive number", text)
	}
	return n
}

// covered is what was tried of one operation.
type covered struct {
	name            string
	points          int // from first to last, and the answer
	repeated, given int // points that were tried and reached, by what followed
	within          int // the same, killed while the kernel makes the change, and repeated
	took            time.Duration
}

// withinStep is the step of the kills while the kernel makes a change: they are
// no substitute for those before it, which are exact.
func withinStep(step int) int {
	if step == 1 {
		return 1
	}
	return 3 * step
}

// newWorldFor starts the driver that an operation is for.
func newWorldFor(t *testing.T, o operation) *world {
	t.Helper()
	if o.copies {
		return newWorldOn(t, "ext4", o.alone)
	}
	return newWorld(t, o.alone)
}

func TestNothingIsLostAndNothingIsLeftWhereverTheDriverIsKilled(t *testing.T) {
	step := every(t)
	var table []covered
	for _, o := range operations {
		t.Run(o.name, func(t *testing.T) {
			began := time.Now()
			c := o.cover(t, step)
			c.took = time.Since(began)
			table = append(table, c)
		})
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%-57s %6s %8s %8s %8s %6s\n", "operation", "points", "repeated", "within", "given up", "s")
	var sum covered
	for _, c := range table {
		fmt.Fprintf(&text, "%-57s %6d %8d %8d %8d %6.1f\n", c.name, c.points, c.repeated, c.within, c.given, c.took.Seconds())
		sum.points, sum.repeated, sum.within, sum.given = sum.points+c.points, sum.repeated+c.repeated, sum.within+c.within, sum.given+c.given
	}
	fmt.Fprintf(&text, "%-57s %6d %8d %8d %8d", "all", sum.points, sum.repeated, sum.within, sum.given)
	t.Logf("every %d. point:\n%s", step, &text)
}

// cover tries an operation without a crash, then with one at each point.
func (o operation) cover(t *testing.T, step int) covered {
	t.Helper()
	w := newWorldFor(t, o)
	if o.once != nil {
		o.once(w)
	}
	w.at = "before"
	base := w.look()
	w.compare("before", base, base.lines)

	w.at = "without a crash"
	o.prepared(w)
	tr := w.try(o, point{}, false)
	if tr.killed.Load() {
		t.Fatal("the driver was killed, and nobody said so")
	}
	reference := w.look()
	w.compare("after the call", reference, reference.lines)
	o.finish(w, base.lines)
	last := len(tr.changes)
	if o.most > 0 {
		last = min(last, o.most)
	}
	t.Logf("%d changes:\n%s", len(tr.changes), strings.Join(tr.changes[:last], "\n"))
	c := covered{name: o.name, points: last}
	// The number of changes may vary a little, because some are made in the
	// background: all points means on to where the call ends before the kill.
	on := func(n int) bool { return n <= last || step == 1 && o.most == 0 }
	for n := 1; on(n) && o.repeat(w, point{n: n}, base.lines, reference.lines); n += step {
		c.repeated++
	}
	if o.call != nil && o.most == 0 {
		c.points++
		if o.repeat(w, point{n: tr.answered, answer: true}, base.lines, reference.lines) {
			c.repeated++
		}
	}
	for n := 1 + step/3; on(n) && o.repeat(w, point{n: n, within: true}, base.lines, reference.lines); n += withinStep(step) {
		c.within++
	}
	if !o.ends {
		for n := 1 + step/2; on(n) && o.giveUp(w, point{n: n}, base.lines); n += step {
			c.given++
		}
	}
	c.points = max(c.points, c.repeated)
	w.at = "end"
	o.tearDown(w)
	return c
}

func (o operation) prepared(w *world) {
	w.t.Helper()
	if o.prepare != nil {
		o.prepare(w)
	}
}

// finish checks the data and undoes all.
func (o operation) finish(w *world, base []string) {
	w.t.Helper()
	if o.check != nil {
		o.check(w)
	}
	if o.undo != nil {
		o.undo(w)
	}
	w.compare("after all is undone", w.look(), base)
}

// crash kills the driver at a point, and starts it again.
func (o operation) crash(w *world, what string, at point, family bool) bool {
	w.t.Helper()
	w.at = fmt.Sprintf("%s, killed at point %d (at the answer %t, within %t), to %s", o.name, at.n, at.answer, at.within, what)
	o.prepared(w)
	tr := w.try(o, at, family)
	if !tr.killed.Load() {
		return false
	}
	w.at = fmt.Sprintf("%s, killed at change %d (%s), to %s", o.name, len(tr.changes), tr.changes[len(tr.changes)-1], what)
	w.Start()
	if o.started != nil {
		o.started(w)
	}
	return true
}

// repeat crashes at a point, and repeats the call. It tells whether the point
// was reached.
func (o operation) repeat(w *world, at point, base, reference []string) bool {
	w.t.Helper()
	killed := o.crash(w, "be repeated", at, true)
	if killed && o.call != nil {
		w.must(w.until(func(ctx context.Context) error { return o.call(ctx, w) }, codes.Aborted))
	}
	w.compare("after the call was repeated", w.look(), reference)
	w.Kill()
	w.Start()
	w.compare("after one more start", w.look(), reference)
	o.finish(w, base)
	return killed
}

// giveUp crashes at a point, and undoes what there is. It tells whether the
// point was reached.
func (o operation) giveUp(w *world, at point, base []string) bool {
	w.t.Helper()
	killed := o.crash(w, "be given up", at, false)
	s := w.look()
	w.compare("after the start", s, s.lines)
	o.undo(w)
	w.compare("after it was given up", w.look(), base)
	return killed
}

// tearDown takes away what all points shared: the data of the bystander is as it
// was, and nothing remains.
func (o operation) tearDown(w *world) {
	w.t.Helper()
	if w.user != nil {
		w.must(w.user.Close())
	}
	for _, name := range []string{"bystander", "source", "raw", "v"} {
		if _, used := w.sums[name]; !used {
			continue
		}
		live := w.live[name]
		if live == nil {
			w.gone(name, w.id(name))
			continue
		}
		w.leave(name, w.id(name))
		w.use(name, w.kinds[name])
		w.holds(name, name)
		last, err := records(w.log(name))
		w.must(err)
		if safe := live.Safe.Load(); last < safe {
			w.t.Fatalf("volume %s ends with record %d of %d", name, last, safe)
		}
		w.gone(name, w.id(name))
	}
	w.uncut("cut")
	s := w.look()
	w.compare("at the end", s, s.lines)
	for _, line := range s.lines {
		if strings.HasPrefix(line, "volume ") || strings.HasPrefix(line, "snapshot ") || strings.HasPrefix(line, "file volumes/") || strings.HasPrefix(line, "file snapshots/") {
			w.t.Errorf("remains: %s", line)
		}
	}
}
