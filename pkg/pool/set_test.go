package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// memory is an engine that keeps its catalog and nothing else: what a [Set]
// reads of one. The methods that it lacks panic.
type memory struct {
	Engine

	info      Info
	volumes   map[string]Volume
	snapshots map[string]Snapshot
	damaged   map[string]bool
	sick      map[string]bool
}

const (
	poolA = "aaaaaaaaaa"
	poolB = "bbbbbbbbbb"
	poolC = "cccccccccc"
)

func newMemory(id, name string, volumes ...string) *memory {
	m := &memory{
		info:      Info{ID: id, Name: name},
		volumes:   map[string]Volume{},
		snapshots: map[string]Snapshot{},
		damaged:   map[string]bool{},
		sick:      map[string]bool{},
	}
	for _, v := range volumes {
		m.add(v)
	}
	return m
}

func (m *memory) add(name string) {
	id := ID{"node-1", m.info.ID, name}.String()
	m.volumes[name] = Volume{ID: id, Name: name, RequestName: name}
	m.snapshots[name] = Snapshot{ID: id, Name: name, RequestName: name, SourceID: "of " + name}
}

func (m *memory) remove(name string) {
	delete(m.volumes, name)
	delete(m.snapshots, name)
}

func (m *memory) Info() Info { return m.info }

func (m *memory) Volume(name string) (Volume, error) {
	if m.damaged[name] {
		return Volume{}, Errorf(ErrDamaged, "%s is damaged", name)
	}
	v, ok := m.volumes[name]
	if !ok {
		return Volume{}, Errorf(ErrNotFound, "%s is not there", name)
	}
	return v, nil
}

func (m *memory) Snapshot(name string) (Snapshot, error) {
	s, ok := m.snapshots[name]
	if !ok {
		return Snapshot{}, Errorf(ErrNotFound, "%s is not there", name)
	}
	return s, nil
}

func (m *memory) Volumes(after string, max int) []Volume     { return page(m.volumes, after, max) }
func (m *memory) Snapshots(after string, max int) []Snapshot { return page(m.snapshots, after, max) }
func (m *memory) Damaged() []string                          { return slices.Sorted(maps.Keys(m.damaged)) }

func page[T any](entries map[string]T, after string, max int) []T {
	var list []T
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		if name > after && (max == 0 || len(list) < max) {
			list = append(list, entries[name])
		}
	}
	return list
}

func (m *memory) VolumesHealth(_ context.Context, names []string) (map[string][]Condition, error) {
	all := map[string][]Condition{}
	for _, name := range names {
		if m.damaged[name] || m.sick[name] {
			all[name] = []Condition{{Severity: Inaccessible, Reason: "Test"}}
		}
	}
	return all, nil
}

func fromEngine(ctx context.Context, e Engine, names []string) (map[string][]Condition, error) {
	return e.VolumesHealth(ctx, names)
}

func newSet(t testing.TB, engines ...Engine) *Set {
	t.Helper()
	s, err := NewSet("node-1", engines...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTwoPoolsCannotHaveOneID(t *testing.T) {
	_, err := NewSet("node-1", newMemory(poolA, "one"), newMemory(poolB, "two"), newMemory(poolA, "three"))
	if !errors.Is(err, ErrInvalid) {
		t.Fatalf("NewSet: %v; want ErrInvalid", err)
	}
	for _, word := range []string{"one", "three", poolA} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
}

func TestANodeNeedsAUsableName(t *testing.T) {
	if _, err := NewSet("a/b", newMemory(poolA, "one")); !errors.Is(err, ErrInvalid) {
		t.Errorf("NewSet: %v; want ErrInvalid", err)
	}
}

func TestAPoolIsFoundByName(t *testing.T) {
	fast, standard, slow := newMemory(poolC, "fast"), newMemory(poolA, DefaultPool), newMemory(poolB, "slow")
	for _, c := range []struct {
		rule    string
		engines []Engine
		name    string
		want    Engine
	}{
		{"by its name", []Engine{fast, standard, slow}, "slow", slow},
		{"no name is the one called default", []Engine{fast, standard, slow}, "", standard},
		{"no name is the first where none is called default", []Engine{fast, slow}, "", fast},
		{"default must exist if it is asked for", []Engine{fast, slow}, DefaultPool, nil},
		{"a pool ID is no name", []Engine{fast}, poolC, nil},
		{"names are exact", []Engine{fast}, "FAST", nil},
		{"there may be none", nil, "", nil},
	} {
		got, err := newSet(t, c.engines...).Engine(c.name)
		if c.want != nil {
			if err != nil || got != c.want {
				t.Errorf("%s: %v, %v", c.rule, got, err)
			}
			continue
		}
		if !errors.Is(err, ErrNoSpace) {
			t.Errorf("%s: %v; want ErrNoSpace", c.rule, err)
			continue
		}
		for _, e := range c.engines {
			if !strings.Contains(err.Error(), e.Info().Name) {
				t.Errorf("%s: %q does not name pool %s", c.rule, err, e.Info().Name)
			}
		}
	}
}

func TestAVolumeIsFoundByItsWholeID(t *testing.T) {
	a, b := newMemory(poolA, "a", "v", "w"), newMemory(poolB, "b", "x")
	inline := strings.Repeat("csi-", 20) + "/anything"
	b.volumes[NameFor(inline)] = Volume{ID: inline, Name: NameFor(inline), Ephemeral: true}
	b.volumes["impostor"] = Volume{ID: "not-parsed", Name: "impostor"}
	b.damaged["torn"] = true
	s := newSet(t, a, b)
	for _, c := range []struct {
		rule, id string
		engine   Engine
		name     string
		err      error
	}{
		{"in its pool", "node-1/" + poolA + "/w", a, "w", nil},
		{"in another pool", "node-1/" + poolB + "/x", b, "x", nil},
		{"not in a pool that lacks it", "node-1/" + poolA + "/x", nil, "", ErrNotFound},
		{"not in a pool that is not here", "node-1/" + poolC + "/x", nil, "", ErrNotFound},
		{"not under another node", "node-2/" + poolA + "/w", nil, "", ErrNotFound},
		{"an ephemeral one by whatever ID it was given", inline, b, NameFor(inline), nil},
		{"no other one by an ID that is not ours", "not-parsed", nil, "", ErrNotFound},
		{"a damaged one is not trusted", "node-1/" + poolB + "/torn", nil, "", ErrDamaged},
		{"no ID", "", nil, "", ErrNotFound},
		{"a path", "../" + poolA + "/w", nil, "", ErrNotFound},
	} {
		e, v, err := s.Volume(c.id)
		if !errors.Is(err, c.err) || e != c.engine || v.Name != c.name {
			t.Errorf("%s: Volume(%q) = %v, %q, %v", c.rule, c.id, e, v.Name, err)
		}
	}
	e, name, err := s.Locate("node-1/" + poolB + "/torn")
	if err != nil || e != Engine(b) || name != "torn" {
		t.Errorf("Locate of a damaged volume = %v, %q, %v", e, name, err)
	}
	if _, _, err := s.Locate("node-1/" + poolB + "/nothing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Locate of no volume: %v; want ErrNotFound", err)
	}
}

func TestASnapshotIsFoundByItsWholeID(t *testing.T) {
	a := newMemory(poolA, "a", "s")
	s := newSet(t, a)
	if e, snap, err := s.Snapshot("node-1/" + poolA + "/s"); err != nil || e != Engine(a) || snap.Name != "s" {
		t.Errorf("Snapshot = %v, %q, %v", e, snap.Name, err)
	}
	for _, id := range []string{"", "s", "node-2/" + poolA + "/s", "node-1/" + poolB + "/s", "node-1/" + poolA + "/t"} {
		if _, _, err := s.Snapshot(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("Snapshot(%q): %v; want ErrNotFound", id, err)
		}
	}
}

func TestARequestsNameIsSoughtInAllPools(t *testing.T) {
	a, b := newMemory(poolA, "a", "v"), newMemory(poolB, "b", "w", NameFor("PVC"))
	b.damaged["torn"] = true
	s := newSet(t, a, b)
	for name, want := range map[string]Engine{"v": a, "w": b, "PVC": b} {
		if e, v, err := s.VolumeNamed(name); err != nil || e != want || v.Name != NameFor(name) {
			t.Errorf("VolumeNamed(%q) = %v, %q, %v", name, e, v.Name, err)
		}
		if e, snap, err := s.SnapshotNamed(name); err != nil || e != want || snap.Name != NameFor(name) {
			t.Errorf("SnapshotNamed(%q) = %v, %q, %v", name, e, snap.Name, err)
		}
	}
	if _, _, err := s.VolumeNamed("x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("VolumeNamed of none: %v; want ErrNotFound", err)
	}
	if _, _, err := s.SnapshotNamed("x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("SnapshotNamed of none: %v; want ErrNotFound", err)
	}
	if _, _, err := s.VolumeNamed("torn"); !errors.Is(err, ErrDamaged) {
		t.Errorf("VolumeNamed of a damaged one: %v; want ErrDamaged", err)
	}
}

func TestAVolumeIsHeldByNameAndByIDAlike(t *testing.T) {
	s := newSet(t, newMemory(poolA, "a", "v"))
	for _, c := range []struct{ name, id string }{
		{"v", "node-1/" + poolA + "/v"},
		{"PVC", "node-1/" + poolA + "/" + NameFor("PVC")},
		{"inline volume's ID", "inline volume's ID"},
	} {
		end, err := s.BeginNamed(c.name, Create)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Begin(c.id, Delete); !errors.Is(err, ErrBusy) {
			t.Errorf("delete of %q during its creation: %v; want ErrBusy", c.id, err)
		}
		endSnapshot, err := s.BeginSnapshot(NameFor(c.name), Delete)
		if err != nil {
			t.Errorf("a snapshot of the same name is something else: %v", err)
		}
		endSnapshot()
		end()
	}
}

// lister is one kind of list, by the names of its entries.
type lister struct {
	what string
	read func(s *Set, token string, max int) (names []string, next string, err error)
}

func listers() []lister {
	return []lister{
		{"volumes", func(s *Set, token string, max int) ([]string, string, error) {
			page, next, err := s.Volumes(token, max)
			return names(page, func(v Volume) string { return v.ID }), next, err
		}},
		{"snapshots", func(s *Set, token string, max int) ([]string, string, error) {
			page, next, err := s.Snapshots(token, max, func(Snapshot) bool { return true })
			return names(page, func(s Snapshot) string { return s.ID }), next, err
		}},
		{"unhealthy volumes", func(s *Set, token string, max int) ([]string, string, error) {
			page, next, err := s.Unhealthy(context.Background(), fromEngine, token, max)
			return names(page, func(u Unhealthy) string { return u.ID }), next, err
		}},
	}
}

func names[T any](page []T, name func(T) string) []string {
	var list []string
	for _, entry := range page {
		list = append(list, name(entry))
	}
	return list
}

// threePools are configured in another order than that of their IDs. The one
// in the middle is empty. All volumes are unhealthy.
func threePools() (engines []Engine, want []string) {
	a, b, c := newMemory(poolA, "z"), newMemory(poolB, "y"), newMemory(poolC, "x")
	for _, m := range []*memory{a, c} {
		for i := range 7 {
			name := fmt.Sprintf("v%d", i)
			m.add(name)
			m.sick[name] = true
			want = append(want, ID{"node-1", m.info.ID, name}.String())
		}
	}
	return []Engine{c, a, b}, want
}

func TestPagesMakeUpTheWholeList(t *testing.T) {
	engines, want := threePools()
	s := newSet(t, engines...)
	for _, l := range listers() {
		for _, size := range []int{0, 1, 2, 3, 6, 7, 8, 13, 14, 15, 100} {
			var got []string
			token := ""
			for pages := 1; ; pages++ {
				page, next, err := l.read(s, token, size)
				if err != nil {
					t.Fatalf("%s, pages of %d: %v", l.what, size, err)
				}
				if size > 0 && len(page) > size || next != "" && len(page) != size {
					t.Errorf("%s, pages of %d: page %d has %d", l.what, size, pages, len(page))
				}
				got = append(got, page...)
				if token = next; token == "" {
					break
				}
				if pages > len(want) {
					t.Fatalf("%s, pages of %d: no end", l.what, size)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s, pages of %d:\n%v, want\n%v", l.what, size, got, want)
			}
		}
	}
}

func TestATokenStaysGoodWhenTheListChanges(t *testing.T) {
	for _, l := range listers() {
		engines, want := threePools()
		s := newSet(t, engines...)
		a := s.engineByID(poolA).(*memory)

		first, token, err := l.read(s, "", 3) // v0, v1, v2
		if err != nil {
			t.Fatal(err)
		}
		for _, gone := range []string{"v0", "v2", "v4"} { // v2 is what the token names
			a.remove(gone)
			delete(a.sick, gone)
		}
		for _, added := range []string{"a-before", "v2-between", "v9-behind"} {
			a.add(added)
			a.sick[added] = true
		}
		rest, next, err := l.read(s, token, 0)
		if err != nil || next != "" {
			t.Fatalf("%s: next %q, %v", l.what, next, err)
		}
		id := func(name string) string { return ID{"node-1", poolA, name}.String() }
		wantRest := append([]string{id("v2-between"), id("v3"), id("v5"), id("v6"), id("v9-behind")}, want[7:]...)
		if !slices.Equal(first, want[:3]) || !slices.Equal(rest, wantRest) {
			t.Errorf("%s: got %v, then %v, want %v", l.what, first, rest, wantRest)
		}
	}
}

func TestATokenOfAPoolThatIsGoneContinuesWithTheNext(t *testing.T) {
	a, c := newMemory(poolA, "a", "v"), newMemory(poolC, "c", "w")
	page, next, err := newSet(t, a, c).Volumes(makeToken(poolB, "v"), 0)
	if err != nil || next != "" || len(page) != 1 || page[0].Name != "w" {
		t.Errorf("Volumes = %v, %q, %v", page, next, err)
	}
}

func TestAListsFilterDoesNotShortenItsPages(t *testing.T) {
	m := newMemory(poolA, "a")
	for i := range 100 {
		m.add(fmt.Sprintf("v%02d", i))
	}
	s := newSet(t, m)
	keep := func(s Snapshot) bool { return strings.HasSuffix(s.Name, "7") }
	var got []string
	for token := ""; ; {
		page, next, err := s.Snapshots(token, 3, keep)
		if err != nil {
			t.Fatal(err)
		}
		if next != "" && len(page) != 3 {
			t.Errorf("a page has %d", len(page))
		}
		got = append(got, names(page, func(s Snapshot) string { return s.Name })...)
		if token = next; token == "" {
			break
		}
	}
	if want := "v07 v17 v27 v37 v47 v57 v67 v77 v87 v97"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestEphemeralVolumesAreNotListed(t *testing.T) {
	m := newMemory(poolA, "a", "v")
	m.volumes["inline"] = Volume{ID: "inline", Name: "inline", Ephemeral: true}
	page, _, err := newSet(t, m).Volumes("", 0)
	if err != nil || len(page) != 1 || page[0].Name != "v" {
		t.Errorf("Volumes = %v, %v", page, err)
	}
}

func TestTheUnhealthyAreListedWithTheDamagedAndWithoutTheHealthy(t *testing.T) {
	m := newMemory(poolA, "a", "b-well", "c-sick", "e-well")
	m.sick["c-sick"] = true
	for _, name := range []string{"A strange name", "a-torn", "d-torn", "f-torn"} {
		m.damaged[name] = true
	}
	s := newSet(t, m)
	want := []string{"A strange name", "a-torn", "c-sick", "d-torn", "f-torn"}
	for _, size := range []int{0, 1, 2, 7} {
		var got []string
		for token := ""; ; {
			page, next, err := s.Unhealthy(context.Background(), fromEngine, token, size)
			if err != nil {
				t.Fatalf("pages of %d: %v", size, err)
			}
			for _, u := range page {
				if len(u.Conditions) == 0 {
					t.Errorf("%s has no conditions", u.ID)
				}
				got = append(got, strings.TrimPrefix(u.ID, "node-1/"+poolA+"/"))
			}
			if token = next; token == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("pages of %d: got %q, want %q", size, got, want)
		}
	}
}

func TestAHealthThatCannotBeToldIsAnError(t *testing.T) {
	s := newSet(t, newMemory(poolA, "a", "well"))
	fails := func(context.Context, Engine, []string) (map[string][]Condition, error) {
		return nil, Errorf(ErrUnavailable, "a test")
	}
	if page, _, err := s.Unhealthy(context.Background(), fails, "", 0); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v, %v; want ErrUnavailable", page, err)
	}
}

// badTokens are starting tokens that no list ever gave out.
var badTokens = []string{
	"x", "0", "1", "-1", "invalid-token", "AAAA", "====", "../..", "node-1/" + poolA + "/v", poolA + "/v",
	makeToken("", ""), makeToken("", "v"), makeToken("A", "v"), makeToken(poolA[1:], "v"), makeToken(poolA, ""),
	makeToken(poolA+"\n", "v"), makeToken("..", ".."), makeToken(poolA, "v") + "=", makeToken(poolA, "v") + "\n",
	strings.Repeat("A", 10_000), "\x00", "é",
}

func TestATokenThatNoListGaveOutIsRefused(t *testing.T) {
	s := newSet(t, newMemory(poolA, "a", "v"))
	for _, l := range listers() {
		for _, token := range badTokens {
			if page, _, err := l.read(s, token, 1); !errors.Is(err, ErrToken) {
				t.Errorf("%s from %.40q: %v, %v; want ErrToken", l.what, token, page, err)
			}
		}
	}
}

func FuzzToken(f *testing.F) {
	engines, all := threePools()
	s := newSet(f, engines...)
	for _, token := range badTokens {
		f.Add(token, 1)
	}
	for _, size := range []int{0, 1, 2, 7} {
		f.Add("", size)
		f.Add(makeToken(poolA, "v3"), size)
		f.Add(makeToken(poolB, "v3"), size)
		f.Add(makeToken(poolC, "v3"), size)
		f.Add(makeToken(poolC, "v6"), size)
	}
	f.Fuzz(func(t *testing.T, token string, size int) {
		size = max(size, 0)
		for _, l := range listers() {
			got, next, err := l.read(s, token, size)
			if err != nil {
				if !errors.Is(err, ErrToken) || len(got) > 0 || next != "" {
					t.Fatalf("%s from %q: %v, %q, %v", l.what, token, got, next, err)
				}
				continue
			}
			// Whatever the token, the page is a piece of the whole list, and
			// its token leads to what follows.
			at := len(all)
			if len(got) > 0 {
				at = slices.Index(all, got[0])
			}
			if at < 0 || !slices.Equal(all[at:at+len(got)], got) {
				t.Fatalf("%s from %q: %v is no piece of the list", l.what, token, got)
			}
			if next == "" {
				if at+len(got) != len(all) {
					t.Errorf("%s from %q ends at %v without a token", l.what, token, got)
				}
				continue
			}
			rest, _, err := l.read(s, next, 0)
			if err != nil || !slices.Equal(rest, all[at+len(got):]) {
				t.Errorf("%s from %q, which followed %v: %v, %v", l.what, next, got, rest, err)
			}
		}
	})
}
