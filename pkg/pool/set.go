package pool

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
)

// DefaultPool is the name of the pool that a request gets which names none; a
// node that has no pool of that name gives its first.
const DefaultPool = "default"

// Set is the pools of one node. It finds volumes and snapshots by ID across
// them, and keeps their operations from overlapping. A name is used once in a
// set, whatever the pool.
type Set struct {
	node     string
	engines  []Engine // as configured
	byPoolID []Engine // ordered by pool ID, which is the order of lists
	ops      Operations
}

// NewSet makes a set of the pools of the node with that name; see
// [NodeSegment].
func NewSet(node string, engines ...Engine) (*Set, error) {
	if _, err := NodeSegment(node); err != nil {
		return nil, err
	}
	s := &Set{node: node, engines: engines, byPoolID: slices.Clone(engines)}
	slices.SortFunc(s.byPoolID, func(a, b Engine) int { return cmp.Compare(a.Info().ID, b.Info().ID) })
	for i := 1; i < len(s.byPoolID); i++ {
		if a, b := s.byPoolID[i-1].Info(), s.byPoolID[i].Info(); a.ID == b.ID {
			return nil, Errorf(ErrInvalid, "pools %q and %q have the same ID %s: one is a copy of the other; a copy of a pool cannot be used beside it", a.Name, b.Name, a.ID)
		}
	}
	return s, nil
}

// Node gives the name of the node.
func (s *Set) Node() string { return s.node }

// Engines gives the pools as configured.
func (s *Set) Engines() []Engine { return s.engines }

// Engine finds a pool by its configured name; no name is the default pool.
// Another node may well have a pool of that name, so that one which is absent
// is ErrNoSpace: the orchestrator then looks elsewhere.
func (s *Set) Engine(name string) (Engine, error) {
	wanted := name
	if wanted == "" {
		wanted = DefaultPool
	}
	for _, e := range s.engines {
		if e.Info().Name == wanted {
			return e, nil
		}
	}
	if name == "" && len(s.engines) > 0 {
		return s.engines[0], nil
	}
	var names []string
	for _, e := range s.engines {
		names = append(names, e.Info().Name)
	}
	return nil, Errorf(ErrNoSpace, "node %s has no pool %q; it has: %s", s.node, wanted, strings.Join(names, ", "))
}

// engineByID finds the pool with that pool ID, or nil.
func (s *Set) engineByID(poolID string) Engine {
	for _, e := range s.engines {
		if e.Info().ID == poolID {
			return e
		}
	}
	return nil
}

// Holds reports whether the pool is here in which a volume or snapshot with that
// ID was made. If it is, that is nowhere else.
func (s *Set) Holds(id string) bool {
	parsed, err := ParseID(id)
	return err == nil && s.engineByID(parsed.Pool) != nil
}

// Volume finds a volume by its ID. An ID that no volume has, or that cannot be
// one, is ErrNotFound.
func (s *Set) Volume(id string) (Engine, Volume, error) {
	parsed, err := ParseID(id)
	if err != nil {
		// The orchestrator makes the ID of an ephemeral volume, so that it
		// can be anything.
		return s.ephemeral(id)
	}
	if e := s.engineByID(parsed.Pool); e != nil {
		v, err := e.Volume(parsed.Name)
		switch {
		case err == nil && v.ID == id:
			return e, v, nil
		case err != nil && !errors.Is(err, ErrNotFound):
			return nil, Volume{}, err
		}
	}
	return nil, Volume{}, Errorf(ErrNotFound, "volume %s does not exist on node %s", id, s.node)
}

// Locate finds the pool and the name of a volume by its ID, like Volume, but
// also of one that is damaged.
func (s *Set) Locate(id string) (e Engine, name string, err error) {
	e, v, err := s.Volume(id)
	if !errors.Is(err, ErrDamaged) {
		return e, v.Name, err
	}
	parsed, err := ParseID(id)
	if err != nil {
		return nil, "", err
	}
	return s.engineByID(parsed.Pool), parsed.Name, nil
}

func (s *Set) ephemeral(id string) (Engine, Volume, error) {
	for _, e := range s.engines {
		if v, err := e.Volume(NameFor(id)); err == nil && v.Ephemeral && v.ID == id {
			return e, v, nil
		}
	}
	return nil, Volume{}, Errorf(ErrNotFound, "volume %.130q does not exist on node %s", id, s.node)
}

// VolumeNamed finds the volume that CreateVolume was asked for under that
// request name, in any pool. One that is damaged is an error.
func (s *Set) VolumeNamed(requestName string) (Engine, Volume, error) {
	for _, e := range s.engines {
		v, err := e.Volume(NameFor(requestName))
		if err == nil {
			return e, v, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return nil, Volume{}, err
		}
	}
	return nil, Volume{}, Errorf(ErrNotFound, "volume %q does not exist on node %s", requestName, s.node)
}

// Snapshot finds a snapshot by its ID.
func (s *Set) Snapshot(id string) (Engine, Snapshot, error) {
	notFound := Errorf(ErrNotFound, "snapshot %.130q does not exist on node %s", id, s.node)
	parsed, err := ParseID(id)
	if err != nil {
		return nil, Snapshot{}, notFound
	}
	e := s.engineByID(parsed.Pool)
	if e == nil {
		return nil, Snapshot{}, notFound
	}
	snap, err := e.Snapshot(parsed.Name)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, Snapshot{}, err
	}
	if err != nil || snap.ID != id {
		return nil, Snapshot{}, notFound
	}
	return e, snap, nil
}

// SnapshotNamed finds the snapshot that CreateSnapshot was asked for under that
// request name, in any pool.
func (s *Set) SnapshotNamed(requestName string) (Engine, Snapshot, error) {
	for _, e := range s.engines {
		snap, err := e.Snapshot(NameFor(requestName))
		if err == nil {
			return e, snap, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return nil, Snapshot{}, err
		}
	}
	return nil, Snapshot{}, Errorf(ErrNotFound, "snapshot %q does not exist on node %s", requestName, s.node)
}

// Begin enters an operation on the volume with that ID; see
// [Operations.Begin].
func (s *Set) Begin(volumeID string, op Operation) (end func(), err error) {
	name := NameFor(volumeID)
	if parsed, err := ParseID(volumeID); err == nil {
		name = parsed.Name
	}
	return s.ops.Begin(key("volume", name), op)
}

// BeginNamed enters an operation on the volume with that request name.
func (s *Set) BeginNamed(requestName string, op Operation) (end func(), err error) {
	return s.ops.Begin(key("volume", NameFor(requestName)), op)
}

// BeginSnapshot enters an operation on the snapshot with that name in its pool.
func (s *Set) BeginSnapshot(name string, op Operation) (end func(), err error) {
	return s.ops.Begin(key("snapshot", name), op)
}

// Volumes lists volumes of all pools in a stable order, at most max of them (0
// is all), from where token says; no token is the beginning. next is the token
// of the rest, empty at the end. A token stays good when volumes come and go,
// also the one that it names. Damaged and ephemeral volumes are not listed: the
// first cannot be used, the IDs of the second are not the driver's.
func (s *Set) Volumes(token string, max int) (page []Volume, next string, err error) {
	return list(s.byPoolID, token, max, Engine.Volumes,
		func(v Volume) string { return v.Name },
		func(v Volume) bool { return !v.Ephemeral })
}

// Snapshots lists snapshots like Volumes, those that keep holds.
func (s *Set) Snapshots(token string, max int, keep func(Snapshot) bool) (page []Snapshot, next string, err error) {
	return list(s.byPoolID, token, max, Engine.Snapshots,
		func(snap Snapshot) string { return snap.Name }, keep)
}

// VolumesHealth is the health of volumes of one pool, as [Engine.VolumesHealth]
// tells it, or somebody who knows more.
type VolumesHealth func(ctx context.Context, e Engine, names []string) (map[string][]Condition, error)

// Unhealthy is a volume with something wrong.
type Unhealthy struct {
	ID         string
	Conditions []Condition
	name       string
}

// Unhealthy lists the volumes with something wrong, as Volumes lists volumes.
// The ID of a damaged one is what it must have been, were it made on this node.
func (s *Set) Unhealthy(ctx context.Context, health VolumesHealth, token string, max int) (page []Unhealthy, next string, err error) {
	segment, err := NodeSegment(s.node)
	if err != nil {
		return nil, "", err
	}
	var failure error
	read := func(e Engine, after string, max int) []Unhealthy {
		var batch []Unhealthy
		for _, v := range e.Volumes(after, max) {
			batch = append(batch, Unhealthy{ID: v.ID, name: v.Name})
		}
		for _, name := range e.Damaged() {
			if name > after {
				batch = append(batch, Unhealthy{ID: ID{segment, e.Info().ID, name}.String(), name: name})
			}
		}
		slices.SortFunc(batch, func(a, b Unhealthy) int { return cmp.Compare(a.name, b.name) })
		if max > 0 && len(batch) > max {
			batch = batch[:max]
		}
		names := make([]string, len(batch))
		for i := range batch {
			names[i] = batch[i].name
		}
		conditions, err := health(ctx, e, names)
		failure = errors.Join(failure, err)
		for i := range batch {
			batch[i].Conditions = conditions[batch[i].name]
		}
		return batch
	}
	page, next, err = list(s.byPoolID, token, max, read,
		func(u Unhealthy) string { return u.name },
		func(u Unhealthy) bool { return len(u.Conditions) > 0 })
	return page, next, errors.Join(failure, err)
}

// list pages through the pools one after the other. A token is the pool's ID
// and the name of the last entry that was given out.
func list[T any](engines []Engine, token string, max int, read func(e Engine, after string, max int) []T, name func(T) string, keep func(T) bool) (page []T, next string, err error) {
	poolID, after, err := parseToken(token)
	if err != nil {
		return nil, "", err
	}
	for _, e := range engines {
		id := e.Info().ID
		if id < poolID {
			continue
		}
		if id > poolID {
			after = ""
		}
		for {
			batch := read(e, after, max)
			for _, entry := range batch {
				after = name(entry)
				if !keep(entry) {
					continue
				}
				if max > 0 && len(page) == max {
					return page, next, nil // there is one more
				}
				page = append(page, entry)
				next = makeToken(id, after)
			}
			if max == 0 || len(batch) < max {
				break
			}
		}
	}
	return page, "", nil
}

func makeToken(poolID, name string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(poolID + "/" + name))
}

func parseToken(token string) (poolID, after string, err error) {
	if token == "" {
		return "", "", nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	poolID, after, _ = strings.Cut(string(raw), "/")
	// A damaged volume's name can be anything that a directory's can.
	if err != nil || !poolIDPattern.MatchString(poolID) || after == "" || strings.Contains(after, "/") || makeToken(poolID, after) != token {
		return "", "", Errorf(ErrToken, "starting token %.130q was not given out by this driver; begin again without one", token)
	}
	return poolID, after, nil
}
