package pool

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// mayOverlap is every pair of operations that may be in flight on one volume
// together. What is not here must be refused, in either order.
var mayOverlap = [][2]Operation{
	{Copy, Copy}, // two readers of what nobody writes

	{Cut, Stage}, {Cut, Publish}, {Cut, Unpublish}, // a reflink is atomic

	{Modify, Cut}, {Modify, Copy}, // limits are none of the data

	{Inspect, Grow}, {Inspect, Modify}, {Inspect, Cut}, {Inspect, Copy}, {Inspect, Hold}, {Inspect, Stage}, {Inspect, Unstage},
	{Inspect, Publish}, {Inspect, Unpublish}, {Inspect, Inspect}, // it only looks
}

func TestWhatMayOverlapIsExactlyTheTable(t *testing.T) {
	allowed := map[[2]Operation]bool{}
	for _, pair := range mayOverlap {
		allowed[pair] = true
		allowed[[2]Operation{pair[1], pair[0]}] = true
	}
	for first := range operations {
		for second := range operations {
			var o Operations
			end, err := o.Begin("volume v", first)
			if err != nil {
				t.Fatalf("%s alone: %v", first, err)
			}
			_, err = o.Begin("volume v", second)
			if allowed[[2]Operation{first, second}] {
				if err != nil {
					t.Errorf("%s during %s: %v; want it allowed", second, first, err)
				}
				continue
			}
			if !errors.Is(err, ErrBusy) {
				t.Errorf("%s during %s: %v; want ErrBusy", second, first, err)
				continue
			}
			for _, word := range []string{first.String(), second.String(), "volume v"} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%s during %s: %q does not say %q", second, first, err, word)
				}
			}
			end()
			if _, err := o.Begin("volume v", second); err != nil {
				t.Errorf("%s after %s has ended: %v", second, first, err)
			}
		}
	}
}

func TestEveryOperationHasAName(t *testing.T) {
	seen := map[string]bool{}
	for op := range operations {
		name := op.String()
		if name == "" || seen[name] {
			t.Errorf("operation %d is called %q", op, name)
		}
		seen[name] = true
	}
}

func TestAnOperationMustSuitAllThatAreInFlight(t *testing.T) {
	var o Operations
	endInspect, err := o.Begin("v", Inspect)
	if err != nil {
		t.Fatal(err)
	}
	endCut, err := o.Begin("v", Cut)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Begin("v", Grow); !errors.Is(err, ErrBusy) {
		t.Errorf("grow during inspect and cut: %v; want ErrBusy", err)
	}
	endInspect()
	if _, err := o.Begin("v", Grow); !errors.Is(err, ErrBusy) {
		t.Errorf("grow during cut, after inspect: %v; want ErrBusy", err)
	}
	endCut()
	if _, err := o.Begin("v", Grow); err != nil {
		t.Errorf("grow after both: %v", err)
	}
}

func TestOneOfTwoEqualOperationsEndsAlone(t *testing.T) {
	var o Operations
	endFirst, err := o.Begin("v", Copy)
	if err != nil {
		t.Fatal(err)
	}
	endSecond, err := o.Begin("v", Copy)
	if err != nil {
		t.Fatal(err)
	}
	endFirst()
	endFirst() // the second time does nothing
	if _, err := o.Begin("v", Delete); !errors.Is(err, ErrBusy) {
		t.Errorf("delete while a copy goes on: %v; want ErrBusy", err)
	}
	endSecond()
	if _, err := o.Begin("v", Delete); err != nil {
		t.Errorf("delete after both copies: %v", err)
	}
}

func TestVolumesDoNotHinderEachOther(t *testing.T) {
	var o Operations
	for _, key := range []string{"volume a", "volume b", "snapshot a"} {
		if _, err := o.Begin(key, Delete); err != nil {
			t.Errorf("delete of %s: %v", key, err)
		}
	}
}

func TestNothingIsKeptOfWhatHasEnded(t *testing.T) {
	var o Operations
	for range 3 {
		end, err := o.Begin("v", Create)
		if err != nil {
			t.Fatal(err)
		}
		end()
	}
	if len(o.inFlight) != 0 {
		t.Errorf("%d keys are left", len(o.inFlight))
	}
}

func TestOnlyOneOfManyAtOnceGetsIn(t *testing.T) {
	var (
		o        Operations
		inside   atomic.Int32
		entered  atomic.Int32
		everyone sync.WaitGroup
	)
	for range 8 {
		everyone.Go(func() {
			for range 500 {
				end, err := o.Begin("v", Create)
				if err != nil {
					continue
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d creations at once", n)
				}
				entered.Add(1)
				inside.Add(-1)
				end()
			}
		})
	}
	everyone.Wait()
	if entered.Load() == 0 {
		t.Error("nobody got in")
	}
}
