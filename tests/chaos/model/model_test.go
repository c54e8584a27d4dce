package model

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func newPlanner(seed uint64, nodes ...string) *Planner {
	return &Planner{Random: rand.New(rand.NewPCG(seed, 1)), World: NewWorld(), Room: 12 << 30, Nodes: nodes}
}

func TestAPlanFollowsFromItsSeed(t *testing.T) {
	for seed := range uint64(6) {
		one, other := newPlanner(seed, "a", "b"), newPlanner(seed, "a", "b")
		for range 5 {
			if a, b := append(one.Plan(40), one.Look()...), append(other.Plan(40), other.Look()...); !reflect.DeepEqual(a, b) {
				t.Fatalf("seed %d plans %v and %v", seed, a, b)
			}
		}
	}
}

// replay carries operations out in an order, and fails if one cannot be asked for.
func replay(t *testing.T, plan []Operation) *World {
	t.Helper()
	w := NewWorld()
	for _, o := range plan {
		if err := o.Allowed(w); err != nil {
			t.Fatal(err)
		}
		o.Apply(w)
	}
	return w
}

func TestEveryOperationOfAPlanCanBeAskedFor(t *testing.T) {
	seen := map[Action]int{}
	for seed := range uint64(15) {
		p := newPlanner(seed)
		plan := p.Plan(200)
		for _, o := range plan {
			seen[o.Action]++
		}
		if got, want := replay(t, plan).Facts(), p.World.Facts(); !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d: the world is %v, and the planner's %v", seed, got, want)
		}
	}
	for _, a := range []Action{
		Create, Delete, DeleteInUse, CreateTooLarge, TakeSnapshot, DeleteSnapshot, SnapshotGroup, DeleteGroup,
		Grow, GrowDevice, Stage, Publish, Unpublish, Unstage, Write, List,
	} {
		if seen[a] == 0 {
			t.Errorf("it is never planned to %s", a)
		}
	}
}

func TestClearingLeavesNothing(t *testing.T) {
	for seed := range uint64(8) {
		p := newPlanner(seed)
		plan := append(p.Plan(100), p.Look()...)
		if left := replay(t, append(plan, p.Clear()...)); len(left.Facts()) > 0 {
			t.Fatalf("seed %d: %v is left", seed, left.Facts())
		}
	}
}

// What may be under way at once may be carried out in any order that keeps those
// apart that wait for each other.
func TestTheOrderOfWhatDoesNotWaitMakesNoDifference(t *testing.T) {
	for seed := range uint64(30) {
		p := newPlanner(seed)
		before := p.World.Clone()
		plan := p.Plan(60)
		r := rand.New(rand.NewPCG(seed, 3))
		left := slices.Clone(plan)
		for len(left) > 0 {
			var ready []int
			for i, o := range left {
				if !slices.ContainsFunc(left[:i], o.Waits) {
					ready = append(ready, i)
				}
			}
			i := ready[r.IntN(len(ready))]
			if err := left[i].Allowed(before); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			left[i].Apply(before)
			left = slices.Delete(left, i, i+1)
		}
		if got, want := before.Facts(), p.World.Facts(); !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d: in another order the world is %v, not %v", seed, got, want)
		}
	}
}

func TestWhatIsAllowedWhileOperationsAreUnderWay(t *testing.T) {
	w := NewWorld()
	for i, o := range []Operation{
		{Action: Create, Volume: "a", Kind: Ext4, Size: 10},
		{Action: Create, Volume: "b", Kind: Block, Size: 20},
		{Action: Stage, Volume: "b"},
	} {
		o.Number = i
		o.Apply(w)
	}
	show := func(open ...Operation) string {
		var lines []string
		for what, values := range w.Allowed(open) {
			lines = append(lines, what+"="+strings.Join(sorted(values), "|"))
		}
		slices.Sort(lines)
		return strings.Join(lines, "; ")
	}
	const always = "device b=20; "
	for _, c := range []struct {
		open []Operation
		want string
	}{
		{nil, always + "volume a=10; volume b=20"},
		{[]Operation{{Action: Delete, Volume: "a"}}, always + "volume a=|10; volume b=20"},
		{[]Operation{{Action: Grow, Volume: "a", Size: 15}}, always + "volume a=10|15; volume b=20"},
		{[]Operation{{Action: Grow, Volume: "b", Size: 25}}, always + "volume a=10; volume b=20|25"},
		{[]Operation{{Action: Stage, Volume: "a"}}, "device a=|10; " + always + "staged a=|rw; volume a=10; volume b=20"},
		{[]Operation{{Action: Publish, Volume: "b", Access: ReadOnly}}, always + "published b=|ro; read-only device b=|20; volume a=10; volume b=20"},
		{
			[]Operation{{Action: TakeSnapshot, Volume: "a", Snapshot: "s", GiveUp: true}, {Action: Create, Volume: "c", Kind: Ext4, Size: 10, FromVolume: "a"}},
			always + "snapshot s=|of a, 10; volume a=10; volume b=20; volume c=|10",
		},
		{[]Operation{{Action: DeleteInUse, Volume: "b"}, {Action: List}, {Action: CreateTooLarge, Volume: "d"}}, always + "volume a=10; volume b=20"},
	} {
		if got := show(c.open...); got != c.want {
			t.Errorf("with %v: %s, want %s", c.open, got, c.want)
		}
	}
	if got := w.Facts(); len(got) != 3 {
		t.Errorf("to ask has changed the world: %v", got)
	}
}

func TestWhatACopyMustHold(t *testing.T) {
	w := NewWorld()
	Operation{Action: Create, Volume: "v", Kind: Ext4, Size: 10, Number: 1}.Apply(w)
	v := w.Volumes["v"]
	v.Content.Begin(7)
	v.Content.Progress(100, 101)
	asked := map[string]Content{"v": v.Content.Seen()}
	v.Content.Progress(120, 121)
	Operation{Action: TakeSnapshot, Volume: "v", Snapshot: "s"}.Made(w, asked)
	v.Content.Progress(200, 201)
	v.Content.End(201)

	s := w.Snapshots["s"].Content
	for n, want := range map[int64]bool{99: false, 100: true, 121: true, 122: false} {
		c := s
		c.Last = &Bounds{s.Last.Least, s.Last.Most}
		if err := c.Learn(n); (err == nil) != want {
			t.Errorf("that the copy ends with %d: %v, want it allowed: %t", n, err, want)
		}
	}
	if got := s.Writer(50); got != 7 {
		t.Errorf("record 50 of the copy is of %d", got)
	}

	// What is restored from it is the same each time, and goes on as its own.
	for _, name := range []string{"one", "other"} {
		Operation{Action: Create, Volume: name, Kind: Ext4, Size: 10, FromSnapshot: "s"}.Apply(w)
	}
	one, other := w.Volumes["one"], w.Volumes["other"]
	if err := one.Content.Learn(110); err != nil {
		t.Fatal(err)
	}
	if err := other.Content.Learn(111); err == nil {
		t.Error("two restores of one snapshot may differ")
	}
	one.Content.Begin(8)
	one.Content.Progress(112, 112)
	for n, want := range map[int64]uint64{110: 7, 111: 8} {
		if got := one.Content.Writer(n); got != want {
			t.Errorf("record %d is of %d, want %d", n, got, want)
		}
	}
	if w.Snapshots["s"].Content.Last.Least != 110 || other.Content.Last.Most != 110 {
		t.Error("what was written to one restore is taken for the snapshot's")
	}

	// A copy of what nobody writes to is the same as that.
	Operation{Action: Create, Volume: "clone", Kind: Ext4, Size: 10, FromVolume: "v"}.Made(w, map[string]Content{"v": v.Content.Seen()})
	if c := w.Volumes["clone"].Content; c.Last.Least != 201 || c.Last.Most != 201 {
		t.Errorf("the copy of a volume at rest may end with %+v", *c.Last)
	}
}

func TestFillsAreCopiedAsTheyWere(t *testing.T) {
	w := NewWorld()
	do := func(o Operation) {
		t.Helper()
		if err := o.Allowed(w); err != nil {
			t.Fatal(err)
		}
		o.Apply(w)
	}
	do(Operation{Action: Create, Volume: "v", Kind: Ext4, Size: 10})
	do(Operation{Action: Stage, Volume: "v"})
	do(Operation{Action: Publish, Volume: "v", Access: Writable})
	do(Operation{Action: Write, Volume: "v", Seed: 1, Size: 5})
	do(Operation{Action: SnapshotGroup, Group: "g", Members: []string{"v"}})
	do(Operation{Action: Write, Volume: "v", Seed: 2, Size: 5})
	do(Operation{Action: Create, Volume: "r", Kind: Ext4, Size: 10, FromSnapshot: "g/v"})
	do(Operation{Action: DeleteGroup, Group: "g", Members: []string{"v"}})
	if got := fmt.Sprint(w.Volumes["r"].Content.Fills, w.Volumes["v"].Content.Fills); got != "[{1 5}] [{1 5} {2 5}]" {
		t.Errorf("the fills are %s", got)
	}
}

func TestWhatCannotBeAskedFor(t *testing.T) {
	w := NewWorld()
	Operation{Action: Create, Volume: "v", Kind: Ext4, Size: 10}.Apply(w)
	Operation{Action: TakeSnapshot, Volume: "v", Snapshot: "s"}.Apply(w)
	for _, o := range []Operation{
		{Action: Create, Volume: "v", Kind: Ext4, Size: 10},
		{Action: Create, Volume: "w", Kind: Block, Size: 10, FromSnapshot: "s"},
		{Action: Create, Volume: "w", Kind: Ext4, Size: 9, FromVolume: "v"},
		{Action: Create, Volume: "w", Kind: Ext4, Size: 10, FromVolume: "u"},
		{Action: Delete, Volume: "u"},
		{Action: DeleteInUse, Volume: "v"},
		{Action: TakeSnapshot, Volume: "v", Snapshot: "s"},
		{Action: DeleteSnapshot, Snapshot: "t"},
		{Action: DeleteGroup, Group: "g"},
		{Action: SnapshotGroup, Group: "g", Members: []string{"v", "u"}},
		{Action: Grow, Volume: "v", Size: 10},
		{Action: GrowDevice, Volume: "v"},
		{Action: Publish, Volume: "v", Access: Writable},
		{Action: Unpublish, Volume: "v"},
		{Action: Unstage, Volume: "v"},
		{Action: Write, Volume: "v"},
	} {
		if o.Allowed(w) == nil {
			t.Errorf("%s is allowed", o)
		}
	}
}
