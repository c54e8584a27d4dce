//go:build integration

package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/tests/chaos/model"
)

const mib = int64(1) << 20

// atOnce is how many operations are under way at once.
const atOnce = 7

// strike is something that is done to the machines while operations are under way.
type strike struct {
	Calls int           // it comes after so many calls of the round have begun,
	Delay time.Duration // and so much later
	What  string
	Node  int
	For   time.Duration // that it lasts
}

// run is chaos on its way: machines, what there must be on them, and what is done
// to them.
type run struct {
	t        *testing.T
	site     site
	seed     uint64
	patience time.Duration
	log      *journal

	// Only the test's own goroutine uses these.
	strikes *rand.Rand
	planner *model.Planner
	rounds  int

	gate   gate
	steady sync.RWMutex // held while the world is looked at, and shared by what must not happen then

	calls  atomic.Int64  // of this round
	struck chan struct{} // the strike is due
	due    atomic.Int64  // after so many calls; -1 is that none is

	mu      sync.Mutex
	world   *model.World
	open    map[int]model.Operation // under way, by number
	ids     map[string]string       // of volumes and snapshots, by kind and name
	at      map[string]int          // the node of each volume
	members map[string][]string     // IDs of a group's snapshots
	live    map[string]*writer      // by volume
	writers map[uint64]*writer      // that there ever were
	seen    map[*model.Bounds]int64 // when the last record was begun
	numbers uint64                  // of writers
	failed  error

	figures figures
}

// figures is what was done.
type figures struct {
	operations, calls, kills, stops, cuts, calledOff, repeated atomic.Int64
	looks, looked, groups                                      atomic.Int64 // at a volume's data, and bytes
	records                                                    atomic.Int64
}

// site is the machines that chaos is brought to.
type site interface {
	// strike does something to the machines, and gives what ends it, which is
	// nil if that is nothing.
	strike(s strike) (end func())
	// strikes are what can be done.
	strikes() []string
	// client calls the controller.
	client() clients
	// nodes are the machines with pools.
	nodes() []*machine
	// quiet tells whether nothing goes on when no call is under way. Then calls
	// are not repeated, either, while a strike lasts.
	quiet() bool
}

// gate keeps calls off while a driver is down.
type gate struct {
	mu     sync.Mutex
	moved  *sync.Cond
	closed bool
	inside int
	epoch  int // number of times it was closed
}

func (g *gate) enter() (epoch int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.closed {
		g.moved.Wait()
	}
	g.inside++
	return g.epoch
}

// leave tells whether the gate was closed since the call had entered.
func (g *gate) leave(epoch int) (struck bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	g.moved.Broadcast()
	return g.epoch != epoch
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.epoch++
}

func (g *gate) empty() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.inside > 0 {
		g.moved.Wait()
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = false
	g.moved.Broadcast()
}

// journal is the file with what was done, an entry a line.
type journal struct {
	mu    sync.Mutex
	file  *os.File
	began time.Time
}

func newJournal(t *testing.T) *journal {
	t.Helper()
	f, err := os.Create(filepath.Join(t.ArtifactDir(), "operations.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		if !t.Failed() {
			return
		}
		text, err := os.ReadFile(f.Name())
		if err != nil {
			t.Error(err)
			return
		}
		kept, err := os.CreateTemp("", "orlop-chaos-*.jsonl") //nolint:usetesting // the test's own directory goes with it
		if err == nil {
			_, err = kept.Write(text)
		}
		if err != nil {
			t.Error(err)
			return
		}
		kept.Close()
		t.Logf("what was done is in %s", kept.Name())
	})
	return &journal{file: f, began: time.Now()}
}

// entry is a line of the journal.
type entry struct {
	MS        int64            `json:"ms"` // since the beginning
	Event     string           `json:"event"`
	Round     int              `json:"round,omitempty"`
	Number    int              `json:"number,omitempty"` // of the operation
	Call      string           `json:"call,omitempty"`
	Error     string           `json:"error,omitempty"`
	Operation *model.Operation `json:"operation,omitempty"`
	Strike    *strike          `json:"strike,omitempty"`
}

func (j *journal) add(e entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e.MS = time.Since(j.began).Milliseconds()
	line, err := json.Marshal(e)
	if err == nil {
		_, err = j.file.Write(append(line, '\n'))
	}
	if err != nil {
		panic(err) // a test without its log would be of no use
	}
}

func newRun(t *testing.T, s site, seed uint64, room int64, nodes []string) *run {
	t.Helper()
	r := &run{
		t: t, site: s, seed: seed, patience: patience(t), log: newJournal(t),
		strikes: rand.New(rand.NewPCG(seed, 2)),
		planner: &model.Planner{Random: rand.New(rand.NewPCG(seed, 1)), World: model.NewWorld(), Room: room, Nodes: nodes},
		world:   model.NewWorld(), open: map[int]model.Operation{}, ids: map[string]string{}, at: map[string]int{},
		members: map[string][]string{}, live: map[string]*writer{}, writers: map[uint64]*writer{}, seen: map[*model.Bounds]int64{},
		numbers: seed << 20,
	}
	r.gate.moved = sync.NewCond(&r.gate.mu)
	t.Cleanup(r.cleanUp)
	return r
}

// cleanUp ends the writers. What a failed test has left frozen would hold them up.
func (r *run) cleanUp() {
	for _, m := range r.site.nodes() {
		if r.t.Failed() {
			m.thaw(r.t)
		}
	}
	for _, w := range r.live {
		_ = w.End()
	}
}

// fail notes the first violation. Everything ends with it.
func (r *run) fail(err error) {
	if err == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed == nil {
		r.failed = err
		r.log.add(entry{Event: "violation", Error: err.Error()})
	}
}

func (r *run) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

// must fails the test if there was a violation.
func (r *run) must(what string) {
	r.t.Helper()
	if err := r.failure(); err != nil {
		r.t.Fatalf("seed %d, round %d, %s: %v", r.seed, r.rounds, what, err)
	}
}

// round carries out operations, several at once, while strikes fall.
func (r *run) round(plan []model.Operation, strikes []strike) {
	r.t.Helper()
	r.rounds++
	for _, o := range plan {
		r.log.add(entry{Event: "plan", Round: r.rounds, Number: o.Number, Operation: &o})
	}
	r.calls.Store(0)
	r.struck = make(chan struct{}, 1)
	ended := make(chan struct{})
	r.aim(strikes)
	go func() {
		defer close(ended)
		r.carryOut(plan)
	}()
	for len(strikes) > 0 {
		select {
		case <-ended:
		case <-r.struck:
		}
		time.Sleep(strikes[0].Delay)
		r.strike(strikes[0])
		strikes = strikes[1:]
		r.aim(strikes)
	}
	<-ended
	r.must("in the round")
	r.fail(r.look(nil))
	r.must("after the round")
}

// aim has the first strike fall when it is due.
func (r *run) aim(strikes []strike) {
	r.due.Store(-1)
	if len(strikes) > 0 {
		r.due.Store(r.calls.Load() + int64(strikes[0].Calls))
	}
}

// strike has one fall, and looks at the world before it goes on.
func (r *run) strike(s strike) {
	r.t.Helper()
	r.log.add(entry{Event: "strike", Strike: &s})
	if r.site.quiet() {
		r.gate.close()
	}
	end := r.site.strike(s)
	switch s.What {
	case "kill":
		r.figures.kills.Add(1)
	case "stop":
		r.figures.stops.Add(1)
	default:
		r.figures.cuts.Add(1)
	}
	if r.site.quiet() {
		r.gate.empty()
	}
	if end != nil {
		if !r.site.quiet() {
			time.Sleep(s.For)
		}
		end()
	}
	r.log.add(entry{Event: "over", Strike: &s})
	if !r.site.quiet() { // calls have ended by themselves, or do so now
		r.gate.close()
		r.gate.empty()
	}
	r.steady.Lock()
	defer r.steady.Unlock()
	r.mu.Lock()
	open := r.openOperations()
	r.mu.Unlock()
	r.fail(r.look(open))
	r.gate.open()
}

// carryOut does operations in the order of the plan where they wait for each
// other, and several at once else.
func (r *run) carryOut(plan []model.Operation) {
	done := make([]chan struct{}, len(plan))
	turn := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i, o := range plan {
		done[i] = make(chan struct{})
		var before []chan struct{}
		for j := range i {
			if o.Waits(plan[j]) {
				before = append(before, done[j])
			}
		}
		all.Go(func() {
			defer close(done[i])
			for _, d := range before {
				<-d
			}
			turn <- struct{}{}
			defer func() { <-turn }()
			if r.failure() == nil {
				r.do(o)
			}
		})
	}
	all.Wait()
}

// do carries out an operation.
func (r *run) do(o model.Operation) {
	r.mu.Lock()
	r.open[o.Number] = o
	r.mu.Unlock()
	err := r.perform(o)
	r.mu.Lock()
	delete(r.open, o.Number)
	r.mu.Unlock()
	text := ""
	if err != nil {
		text = err.Error()
		r.fail(fmt.Errorf("%s: %w", o, err))
	}
	r.figures.operations.Add(1)
	r.log.add(entry{Event: "done", Number: o.Number, Error: text})
}

// ask makes a call as the operation says that it is made, and repeats it, as an
// orchestrator does, until there is an answer: success, or one of the codes that
// are wanted.
func ask[T any](r *run, o model.Operation, what string, call func(context.Context) (T, error), want ...codes.Code) (T, error) {
	struck := false
	for try, deadline := 0, time.Now().Add(4*r.patience); ; try++ {
		limit, twins := 2*r.patience, 1
		if try == 0 && o.CallOff > 0 {
			limit = o.CallOff
			r.figures.calledOff.Add(1)
		}
		if try == 0 && o.Twice {
			twins = 2
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		responses, errs, hits := make([]T, twins), make([]error, twins), make([]bool, twins)
		var both sync.WaitGroup
		for i := range twins {
			both.Go(func() { responses[i], hits[i], errs[i] = once(ctx, r, o, what, call) })
		}
		both.Wait()
		cancel()
		struck = struck || slices.Contains(hits, true)
		answer, err := -1, error(nil)
		for i := range twins {
			code := status.Code(errs[i])
			switch {
			case errs[i] == nil || slices.Contains(want, code):
				answer = i
			case repeatable(code):
				err = errs[i]
			case code == codes.FailedPrecondition && (struck || elsewhere(errs[i])): // a program that outlived the driver may still have the device
				err = errs[i]
			default:
				return responses[i], fmt.Errorf("%s: %w", what, errs[i])
			}
		}
		if answer >= 0 {
			return responses[answer], errs[answer]
		}
		switch {
		case r.failure() != nil:
			return responses[0], errEnded
		case time.Now().After(deadline):
			return responses[0], fmt.Errorf("%s: there is no answer after %d tries: %w", what, try+1, err)
		}
		r.figures.repeated.Add(1)
		time.Sleep(time.Duration(min(try+1, 20)) * 5 * time.Millisecond)
	}
}

// elsewhere tells whether a device was not let go although its filesystem was
// unmounted, which is so where somebody on this machine, who has nothing to do with
// the test, has just made a mount namespace: that has everything mounted, too.
func elsewhere(err error) bool { return strings.Contains(err.Error(), "is mounted or claimed") }

// errEnded is why an operation ends when another has failed.
var errEnded = errors.New("something else has failed")

// once makes one call, and tells whether something fell on the driver meanwhile.
func once[T any](ctx context.Context, r *run, o model.Operation, what string, call func(context.Context) (T, error)) (response T, struck bool, err error) {
	epoch := r.gate.enter()
	if due := r.due.Load(); r.calls.Add(1) >= due && due >= 0 && r.due.CompareAndSwap(due, -1) {
		r.struck <- struct{}{}
	}
	r.figures.calls.Add(1)
	response, err = call(ctx)
	struck = r.gate.leave(epoch) || status.Code(err) == codes.Unavailable
	text := ""
	if err != nil {
		text = err.Error()
	}
	r.log.add(entry{Event: "call", Number: o.Number, Call: what, Error: text})
	return response, struck, err
}

// repeatable tells whether an answer leaves open what happened, or says that the
// call is to be repeated.
func repeatable(code codes.Code) bool {
	switch code {
	case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	default:
		return false
	}
}

func (r *run) summary() string {
	f := &r.figures
	return fmt.Sprintf("seed %d: %d rounds, %d operations in %d calls (%d called off, %d repeated), %d kills, %d stops, %d other strikes, %d records written, %d looks at data, %d MiB and %d groups compared",
		r.seed, r.rounds, f.operations.Load(), f.calls.Load(), f.calledOff.Load(), f.repeated.Load(), f.kills.Load(), f.stops.Load(), f.cuts.Load(),
		f.records.Load(), f.looks.Load(), f.looked.Load()/mib, f.groups.Load())
}
