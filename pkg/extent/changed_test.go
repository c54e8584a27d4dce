package extent_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/orlop-csi/orlop/pkg/extent"
)

// A model is a file of blocks of one byte each, and says of each what it is: 0 a
// hole, 1 reserved, 2 opaque, and from 3 on located, at that place.
type model []byte

func (m model) state(i int) extent.State {
	switch m[i] {
	case 1:
		return extent.Reserved
	case 2:
		return extent.Opaque
	default:
		return extent.Located
	}
}

// source gives the model's extents as a filesystem might: cuts says which
// neighbours are one extent (bit 0 clear) and which batches end (bit 1).
func (m model) source(cuts []byte) extent.Source {
	return func(yield func([]extent.Extent, error) bool) {
		cut := func(i int) byte {
			if len(cuts) == 0 {
				return 0
			}
			return cuts[i%len(cuts)]
		}
		var batch []extent.Extent
		for i := range m {
			if m[i] == 0 {
				continue
			}
			e := extent.Extent{Offset: int64(i), Length: 1, State: m.state(i)}
			if e.State == extent.Located {
				e.Physical = int64(m[i])
			}
			if n := len(batch); n > 0 && cut(i)&1 == 0 {
				last := &batch[n-1]
				if last.Offset+last.Length == e.Offset && last.State == e.State &&
					(e.State != extent.Located || last.Physical+last.Length == e.Physical) {
					last.Length++
					continue
				}
			}
			if cut(i)&2 != 0 {
				if !yield(batch, nil) {
					return
				}
				batch = nil
			}
			batch = append(batch, e)
		}
		yield(batch, nil)
	}
}

func (m model) at(i int) byte {
	if i < len(m) {
		return m[i]
	}
	return 0
}

// changed is what Changed has to find, block by block.
func changed(base, target model, from, to int) (want []extent.Range) {
	for i := from; i < to; i++ {
		a, b := base.at(i), target.at(i)
		if a == b && a != 2 || a <= 1 && b <= 1 {
			continue
		}
		if n := len(want); n > 0 && want[n-1].Offset+want[n-1].Length == int64(i) {
			want[n-1].Length++
			continue
		}
		want = append(want, extent.Range{Offset: int64(i), Length: 1})
	}
	return want
}

func collect(t *testing.T, base, target extent.Source, from, to int64) (got []extent.Range) {
	t.Helper()
	for r, err := range extent.Changed(base, target, from, to) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
	}
	return got
}

func TestWhatIsInTheSamePlaceIsUnchanged(t *testing.T) {
	for _, c := range []struct {
		rule         string
		base, target model
		want         []extent.Range
	}{
		{"nothing and nothing", model{0, 0, 0}, model{0, 0, 0}, nil},
		{"the same places", model{3, 4, 9}, model{3, 4, 9}, nil},
		{"another place", model{3, 4, 9}, model{3, 5, 9}, []extent.Range{{1, 1}}},
		{"a neighbour's place", model{3, 4, 5}, model{4, 5, 6}, []extent.Range{{0, 3}}},
		{"written where nothing was", model{0, 3}, model{7, 3}, []extent.Range{{0, 1}}},
		{"given back", model{7, 3}, model{0, 3}, []extent.Range{{0, 1}}},
		{"reserved and not written", model{0, 1}, model{1, 0}, nil},
		{"reserved, then written", model{1, 1, 1}, model{1, 8, 1}, []extent.Range{{1, 1}}},
		{"written, then reserved anew", model{8}, model{1}, []extent.Range{{0, 1}}},
		{"without a place on both sides", model{2, 2}, model{2, 2}, []extent.Range{{0, 2}}},
		{"without a place on one", model{2, 3}, model{3, 2}, []extent.Range{{0, 2}}},
		{"the target is longer", model{3}, model{3, 0, 6, 1}, []extent.Range{{2, 1}}},
		{"the base was never written", nil, model{3, 0, 1, 2, 9}, []extent.Range{{0, 1}, {3, 2}}},
		{"the target was never written", model{3, 1, 2}, nil, []extent.Range{{0, 1}, {2, 1}}},
		{"neighbours are one range", model{3, 4, 5, 6}, model{9, 0, 20, 6}, []extent.Range{{0, 3}}},
	} {
		got := collect(t, c.base.source(nil), c.target.source(nil), 0, 8)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.rule, got, c.want)
		}
	}
}

func TestNothingWasWrittenInNone(t *testing.T) {
	if got := collect(t, extent.None, extent.None, 0, 1<<62); got != nil {
		t.Errorf("%v", got)
	}
	all := model{9, 1, 2}
	if got, want := collect(t, extent.None, all.source(nil), 0, 3), []extent.Range{{0, 1}, {2, 1}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestAnErrorOfEitherSourceEndsTheRanges(t *testing.T) {
	why := errors.New("the disk is gone")
	failing := func(yield func([]extent.Extent, error) bool) {
		if yield([]extent.Extent{{Offset: 0, Length: 1, Physical: 50}}, nil) {
			yield(nil, why)
		}
	}
	good := model{3, 4, 5}.source(nil)
	for rule, pair := range map[string][2]extent.Source{"base": {failing, good}, "target": {good, failing}} {
		var last error
		for r, err := range extent.Changed(pair[0], pair[1], 0, 3) {
			if last != nil {
				t.Errorf("%s: %v after the error", rule, r)
			}
			last = err
		}
		if !errors.Is(last, why) {
			t.Errorf("%s: ended with %v", rule, last)
		}
	}
}

func TestExtentsOutOfOrderAreAnErrorAndNotAGuess(t *testing.T) {
	for rule, extents := range map[string][]extent.Extent{
		"backwards": {{Offset: 2, Length: 1}, {Offset: 0, Length: 1}},
		"over":      {{Offset: 0, Length: 2}, {Offset: 1, Length: 2}},
		"empty":     {{Offset: 0, Length: 0}},
		"negative":  {{Offset: 0, Length: -1}},
	} {
		source := func(yield func([]extent.Extent, error) bool) { yield(extents, nil) }
		var last error
		for _, err := range extent.Changed(extent.None, source, 0, 4) {
			last = err
		}
		if last == nil {
			t.Errorf("%s: no error", rule)
		}
	}
}

func TestALoopOverRangesCanEndEarly(t *testing.T) {
	stopped := 0
	source := func(yield func([]extent.Extent, error) bool) {
		defer func() { stopped++ }()
		for i := int64(0); ; i++ {
			if !yield([]extent.Extent{{Offset: 2 * i, Length: 1, Physical: i}}, nil) {
				return
			}
		}
	}
	for _, err := range extent.Changed(extent.None, source, 0, 1<<40) {
		if err != nil {
			t.Error(err)
		}
		break
	}
	if stopped != 1 {
		t.Errorf("the source was let go of %d times", stopped)
	}
}

func FuzzChanged(f *testing.F) {
	f.Add([]byte{3, 4, 5, 0, 1, 2}, []byte{3, 9, 5, 1, 0, 2, 7}, []byte{0}, byte(0), byte(7))
	f.Add([]byte{}, []byte{3, 4, 5}, []byte{3}, byte(1), byte(2))
	f.Add([]byte{3, 4, 5, 6, 7}, []byte{3, 4, 5, 6, 7}, []byte{1, 2, 0, 3}, byte(0), byte(9))
	f.Fuzz(func(t *testing.T, base, target, cuts []byte, from, to byte) {
		got := collect(t, model(base).source(cuts), model(target).source(cuts), int64(from), int64(to))
		want := changed(base, target, int(from), int(to))
		if !slices.Equal(got, want) {
			t.Fatalf("from %d to %d: %v, want %v", from, to, got, want)
		}
		// Whoever stops anywhere and goes on there gets the rest.
		for _, r := range want {
			next := r.Offset + r.Length
			rest := collect(t, model(base).source(cuts), model(target).source(nil), next, int64(to))
			if want := changed(base, target, int(next), int(to)); !slices.Equal(rest, want) {
				t.Fatalf("going on at %d: %v, want %v", next, rest, want)
			}
		}
	})
}
