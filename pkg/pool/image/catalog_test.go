package image

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestACatalogIsListedInOrderOfNames(t *testing.T) {
	var c catalog[string]
	for _, name := range []string{"c", "a", "d", "b", "a-1", "a.1"} {
		c.put(name, strings.ToUpper(name))
	}
	for _, want := range []struct {
		after string
		max   int
		names string
	}{
		{"", 0, "A A-1 A.1 B C D"},
		{"", 2, "A A-1"},
		{"", 100, "A A-1 A.1 B C D"},
		{"a", 2, "A-1 A.1"},
		{"a-0", 1, "A-1"}, // need not be there
		{"b", 0, "C D"},
		{"d", 0, ""},
		{"zzz", 5, ""},
	} {
		if got := strings.Join(c.list(want.after, want.max), " "); got != want.names {
			t.Errorf("after %q, at most %d: %q, want %q", want.after, want.max, got, want.names)
		}
	}
}

func TestAnEmptyCatalogHasNothing(t *testing.T) {
	var c catalog[int]
	if got := c.list("", 0); len(got) != 0 {
		t.Errorf("list = %v", got)
	}
	if _, ok := c.get("a"); ok {
		t.Error("get found something")
	}
	c.remove("a")
}

func TestAPageIsTheCallersOwn(t *testing.T) {
	var c catalog[int]
	c.put("a", 1)
	c.list("", 0)[0] = 2
	if got, _ := c.get("a"); got != 1 {
		t.Errorf("the catalog has %d", got)
	}
}

func TestACatalogIsAMapThatIsSorted(t *testing.T) {
	var c catalog[int]
	want := map[string]int{}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 5000 {
		name := fmt.Sprintf("v%d", random.IntN(200))
		if random.IntN(3) == 0 {
			c.remove(name)
			delete(want, name)
		} else {
			c.put(name, i)
			want[name] = i
		}
	}
	if !maps.Equal(c.byName, want) || !slices.Equal(c.names, slices.Sorted(maps.Keys(want))) {
		t.Errorf("the catalog has %v in order %v, want %v", c.byName, c.names, want)
	}
}
