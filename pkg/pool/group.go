package pool

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
)

// Group is a group of snapshots, cut of several volumes at one instant. Every
// snapshot of a group carries all of it, and nothing else records it: a group is
// whole if each of its volumes has a snapshot that names it.
type Group struct {
	ID      string   `json:"id"`      // see GroupID
	Name    string   `json:"name"`    // as CreateVolumeGroupSnapshot asked for it
	Volumes []string `json:"volumes"` // IDs of all volumes, of all nodes; sorted
}

// groupPrefix begins the ID of every group.
const groupPrefix = "group/"

// NewGroup describes the group of that name; volumes are IDs, each once.
func NewGroup(requestName string, volumes []string) Group {
	return Group{ID: groupPrefix + NameFor(requestName), Name: requestName, Volumes: slices.Sorted(slices.Values(volumes))}
}

// ValidGroupID reports whether a text can be the ID of a group. Its snapshots
// may be on several nodes, so that it names none.
func ValidGroupID(id string) bool {
	name, ok := strings.CutPrefix(id, groupPrefix)
	return ok && ValidName(name)
}

// SnapshotName gives the request name of the group's snapshot of a volume. It is
// such that no snapshot outside of a group gets the same name by accident.
func (g Group) SnapshotName(volumeID string) string { return g.Name + "/" + volumeID }

// Same reports whether two are of one name and of the same volumes.
func (g Group) Same(other Group) bool {
	return g.ID == other.ID && g.Name == other.Name && slices.Equal(g.Volumes, other.Volumes)
}

// Missing gives the volumes of which the group has no snapshot among these.
func (g Group) Missing(snapshots []Snapshot) []string {
	return slices.DeleteFunc(slices.Clone(g.Volumes), func(id string) bool {
		return slices.ContainsFunc(snapshots, func(s Snapshot) bool { return s.SourceID == id })
	})
}

// MustBeWhole refuses a group of which these are all the snapshots that there
// are, unless that is each.
func (g Group) MustBeWhole(snapshots []Snapshot) error {
	if missing := g.Missing(snapshots); len(missing) > 0 {
		return Errorf(ErrDamaged, "group snapshot %s is not whole: it has no snapshot of %s; what it has can be restored one by one, or delete it", g.ID, strings.Join(missing, ", "))
	}
	return nil
}

// Cutting is snapshots on their way, of volumes of one pool, of one node, or of
// several. [CutTogether] takes it through its phases, in the order in which they
// are here. A phase that fails ends it: Close undoes all that there is.
type Cutting interface {
	// Hold keeps every writer of the volumes off. On return nothing is
	// written to any of them until Release, or until a limit of time is over
	// that ends every hold.
	Hold(ctx context.Context) error
	// Cut takes what the volumes hold, in an instant.
	Cut(ctx context.Context) error
	// Check finds out, once all are cut, whether the writers were kept off
	// all the time.
	Check(ctx context.Context) error
	// Release lets the writers go on.
	Release(ctx context.Context) error
	// Place brings the snapshots to stable storage under their names. Until
	// Confirm, a crash takes them away again.
	Place(ctx context.Context) ([]Snapshot, error)
	// Confirm makes them last.
	Confirm(ctx context.Context) error
	// Close lets the writers go on, whatever has happened, and removes what
	// was not confirmed. It is to be called once, always.
	Close() error
}

// CutTogether cuts snapshots of all volumes at one instant, and closes c: all of
// them are there in the end, or none is.
func CutTogether(ctx context.Context, c Cutting) (snapshots []Snapshot, err error) {
	defer func() { err = JoinErrors(err, c.Close()) }()
	if err := c.Hold(ctx); err != nil {
		return nil, err
	}
	if err := c.Cut(ctx); err != nil {
		return nil, err
	}
	if err := c.Check(ctx); err != nil {
		return nil, err
	}
	if err := c.Release(ctx); err != nil {
		return nil, err
	}
	if snapshots, err = c.Place(ctx); err != nil {
		return nil, err
	}
	if err := c.Confirm(ctx); err != nil {
		return nil, err
	}
	slices.SortFunc(snapshots, func(a, b Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	return snapshots, nil
}

// Together is several that are cut at one instant: each phase is over for all of
// them before the next begins for one.
type Together []Cutting

// Hold implements [Cutting].
func (t Together) Hold(ctx context.Context) error {
	return t.Each(ctx, func(ctx context.Context, c Cutting) error { return c.Hold(ctx) })
}

// Cut implements [Cutting].
func (t Together) Cut(ctx context.Context) error {
	return t.Each(ctx, func(ctx context.Context, c Cutting) error { return c.Cut(ctx) })
}

// Check implements [Cutting].
func (t Together) Check(ctx context.Context) error {
	return t.Each(ctx, func(ctx context.Context, c Cutting) error { return c.Check(ctx) })
}

// Release implements [Cutting].
func (t Together) Release(ctx context.Context) error {
	return t.Each(ctx, func(ctx context.Context, c Cutting) error { return c.Release(ctx) })
}

// Place implements [Cutting].
func (t Together) Place(ctx context.Context) ([]Snapshot, error) {
	var mu sync.Mutex
	var all []Snapshot
	err := t.Each(ctx, func(ctx context.Context, c Cutting) error {
		snapshots, err := c.Place(ctx)
		mu.Lock()
		defer mu.Unlock()
		all = append(all, snapshots...)
		return err
	})
	return all, err
}

// Confirm implements [Cutting].
func (t Together) Confirm(ctx context.Context) error {
	return t.Each(ctx, func(ctx context.Context, c Cutting) error { return c.Confirm(ctx) })
}

// Close implements [Cutting].
func (t Together) Close() error {
	return t.Each(context.Background(), func(_ context.Context, c Cutting) error { return c.Close() })
}

// Each takes all of them through a phase at once, and waits for all.
func (t Together) Each(ctx context.Context, phase func(context.Context, Cutting) error) error {
	errs := make([]error, len(t))
	var phases sync.WaitGroup
	for i, c := range t {
		phases.Go(func() { errs[i] = phase(ctx, c) })
	}
	phases.Wait()
	return JoinErrors(errs...)
}

// Group finds the snapshots of a group that are on this node, and the group as
// they have it.
func (s *Set) Group(id string) (Group, []Snapshot, error) {
	var group Group
	var members []Snapshot
	for _, e := range s.engines {
		for _, snap := range e.Snapshots("", 0) {
			if snap.Group != nil && snap.Group.ID == id {
				group = *snap.Group
				members = append(members, snap)
			}
		}
	}
	if len(members) == 0 {
		return Group{}, nil, Errorf(ErrNotFound, "group snapshot %.130q does not exist on node %s", id, s.node)
	}
	slices.SortFunc(members, func(a, b Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	return group, members, nil
}

// BeginGroup enters an operation on the group with that ID.
func (s *Set) BeginGroup(id string, op Operation) (end func(), err error) {
	return s.ops.Begin(key("group", id), op)
}

// PrepareGroup makes ready to cut the group's snapshots of these volumes of this
// node: the volumes are held against every other operation, the snapshots' room
// is promised, and what can be done beforehand is done.
func (s *Set) PrepareGroup(ctx context.Context, g Group, volumeIDs []string) (_ Cutting, err error) {
	prepared := &groupCutting{}
	defer func() {
		if err != nil {
			err = errors.Join(err, prepared.Close())
		}
	}()
	hold := func(end func(), err error) error {
		if err == nil {
			prepared.ends = append(prepared.ends, end)
		}
		return err
	}
	specs := map[Engine][]SnapshotSpec{}
	for _, id := range volumeIDs {
		if _, _, err := s.Volume(id); err != nil {
			return nil, err
		}
		if err := hold(s.Begin(id, Hold)); err != nil {
			return nil, err
		}
		if err := hold(s.BeginSnapshot(NameFor(g.SnapshotName(id)), Create)); err != nil {
			return nil, err
		}
		e, v, err := s.Volume(id) // as it is now that it is held
		if err != nil {
			return nil, err
		}
		specs[e] = append(specs[e], SnapshotSpec{RequestName: g.SnapshotName(id), Volume: v.Name, Group: &g})
	}
	for _, e := range s.engines {
		if len(specs[e]) == 0 {
			continue
		}
		c, err := e.PrepareSnapshots(ctx, specs[e])
		if err != nil {
			return nil, err
		}
		prepared.Together = append(prepared.Together, c)
	}
	return prepared, nil
}

// groupCutting is the part of a group on this node, and the operations that it
// is in.
type groupCutting struct {
	Together

	ends []func()
}

// Close implements [Cutting].
func (c *groupCutting) Close() error {
	err := c.Together.Close()
	for _, end := range c.ends {
		end()
	}
	return err
}

// DeleteGroup removes the snapshots of a group that are on this node. given is
// the IDs of its snapshots as the orchestrator knows them: it is ErrInvalid, and
// nothing is removed, if there are others, or one of them is not of the group. A
// group that is not there is success.
func (s *Set) DeleteGroup(ctx context.Context, id string, given []string) error {
	end, err := s.BeginGroup(id, Delete)
	if err != nil {
		return err
	}
	defer end()
	_, members, err := s.GroupWith(id, given)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.deleteMembers(ctx, members)
}

// GroupWith finds a group like Group, and compares it with the IDs of its
// snapshots as the orchestrator knows them: ErrInvalid if there are others, or
// one of them is not of the group.
func (s *Set) GroupWith(id string, given []string) (Group, []Snapshot, error) {
	group, members, err := s.Group(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Group{}, nil, err
	}
	for _, m := range members {
		if !slices.Contains(given, m.ID) {
			return Group{}, nil, Errorf(ErrInvalid, "snapshot_ids: group snapshot %s has snapshot %s too", id, m.ID)
		}
	}
	for _, other := range given {
		if _, snap, err := s.Snapshot(other); err == nil && (snap.Group == nil || snap.Group.ID != id) {
			return Group{}, nil, Errorf(ErrInvalid, "snapshot_ids: snapshot %s is not of group snapshot %s", other, id)
		}
	}
	return group, members, err
}

// deleteMembers removes snapshots of a group, whose operation has begun: all are
// entered before one is removed.
func (s *Set) deleteMembers(ctx context.Context, members []Snapshot) error {
	for _, m := range members {
		end, err := s.BeginSnapshot(m.Name, Delete)
		if err != nil {
			return err
		}
		defer end()
	}
	for _, m := range members {
		e, snap, err := s.Snapshot(m.ID)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err == nil {
			err = e.DeleteSnapshot(ctx, snap.Name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ClearGroup removes what there is on this node of a group that is not whole. It
// was never answered: a group is confirmed on all nodes before it is, and one
// that a crash between two nodes left in part is made anew.
func (s *Set) ClearGroup(ctx context.Context, id string) error {
	_, members, err := s.Group(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.deleteMembers(ctx, members)
}
