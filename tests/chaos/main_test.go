//go:build integration

// Package chaos uses the real driver as a busy cluster would, at random, while
// everything is killed that can be, and compares what there is with what there
// must be.
//
// What there must be is told by the package model: a small pure description of
// all volumes and snapshots, of what is staged and published, and of what each
// must contain. Operations are planned from a seed: which, on what, and how they
// are asked for (called off, twice at once, given up); and when something strikes.
// They are carried out several at once, in the plan's order where one waits for
// another, and repeated until they have an answer, as an orchestrator does. In every
// volume that is published a writer appends records, and brings each to stable
// storage before it begins the next.
//
// After every strike, before a call is repeated, the world must be one that the
// model allows: each operation that was under way has had its effect or has not.
// After every round it must be the one of the model: lists, the files of the pool,
// loop devices, mounts and paths, the capacity to the byte; no writer has seen an
// error, none hangs, and no record is missing. The data of volumes is looked at
// whenever they are published, and that of snapshots when they are restored, which
// at the end is done with all. In the end everything is removed, and nothing may be
// left.
//
// Environment variables: ORLOP_CHAOS_DURATION is how long it goes on, and
// ORLOP_CHAOS_ROUNDS for how many rounds at least, a few if it is not set. ORLOP_CHAOS_SEED is the seed, else
// 1, or a random one if a duration is set; it is printed. ORLOP_CHAOS_PATIENCE is how long something may
// take that should take no time, 30s if it is not set. With the same seed the same
// operations are planned, and the same strikes after the same number of calls. What
// they hit depends on the machine: how far each operation has got is for the
// scheduler to say. The file operations.jsonl, which is kept if the test fails, has
// the plan and every call that was made, with its time and its answer.
package chaos

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// The rounds that there are if no time is given, and the operations of a round.
const (
	fewRounds    = 6
	fewOfFleet   = 3
	operations   = 24
	roundsToLook = 8 // rounds after which all data is looked at
)

func setting[T any](t *testing.T, name string, fallback T, parse func(string) (T, error)) T {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	value, err := parse(text)
	if err != nil {
		t.Fatalf("%s=%s: %v", name, text, err)
	}
	return value
}

func patience(t *testing.T) time.Duration {
	t.Helper()
	return setting(t, "ORLOP_CHAOS_PATIENCE", 30*time.Second, time.ParseDuration)
}

func seed(t *testing.T) uint64 {
	t.Helper()
	fallback := uint64(1)
	if os.Getenv("ORLOP_CHAOS_DURATION") != "" {
		fallback = rand.Uint64N(1e9)
	}
	s := setting(t, "ORLOP_CHAOS_SEED", fallback, func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 32) })
	t.Logf("ORLOP_CHAOS_SEED=%d", s)
	return s
}

func TestOneMachine(t *testing.T) {
	r := newRun(t, startAlone(t), seed(t), poolRoom, nil)
	r.goOn(fewRounds)
}

// goOn brings chaos for as long as is set, or for a few rounds, looks at all data,
// and removes everything.
func (r *run) goOn(few int) {
	r.t.Helper()
	duration := setting(r.t, "ORLOP_CHAOS_DURATION", 0, time.ParseDuration)
	defer func() { r.t.Log(r.summary()) }()
	rounds := setting(r.t, "ORLOP_CHAOS_ROUNDS", few, strconv.Atoi)
	for began := time.Now(); r.rounds < rounds || time.Since(began) < duration; {
		r.round(r.planner.Plan(operations), r.plannedStrikes(operations))
		if r.rounds%roundsToLook == 0 {
			r.lookAtAll()
		}
	}
	r.lookAtAll()
	r.round(r.planner.Clear(), r.plannedStrikes(operations))
	if left := r.world.Facts(); len(left) > 0 {
		r.t.Errorf("what was done leaves %v", left)
	}
}

// lookAtAll looks at the data of everything that there is.
func (r *run) lookAtAll() {
	r.t.Helper()
	plan := r.planner.Look()
	r.round(plan, r.plannedStrikes(len(plan)))
	groups := map[string]bool{}
	for _, s := range r.world.Snapshots {
		groups[s.Group] = true
	}
	for g := range groups {
		r.fail(r.consistent(g))
	}
	r.must("of groups")
}

// plannedStrikes makes up what strikes in a round of n operations.
func (r *run) plannedStrikes(n int) []strike {
	var list []strike
	for range []int{1, 1, 1, 2, 2, 0}[r.strikes.IntN(6)] {
		kinds := r.site.strikes()
		list = append(list, strike{
			Calls: 1 + r.strikes.IntN(n),
			Delay: time.Duration(r.strikes.IntN(40_000)) * time.Microsecond,
			What:  kinds[r.strikes.IntN(len(kinds))],
			Node:  r.strikes.IntN(len(r.site.nodes())),
			For:   time.Duration(r.strikes.IntN(1000)) * time.Millisecond,
		})
	}
	return list
}
