package model

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

const mib = int64(1) << 20

// Planner makes up operations. What it makes up follows from its source of random
// numbers alone.
type Planner struct {
	Random *rand.Rand
	World  *World   // as it is after all that was planned
	Room   int64    // bytes that may be promised
	Nodes  []string // where volumes may be; none is one that has no name

	number int
	counts map[string]int // of snapshots and groups that there ever were, by how their names begin
}

// The most that there is of something at once.
const (
	mostVolumes   = 14
	mostSnapshots = 16
	mostFills     = 3
)

// sizes are the smallest and the largest that a new volume of a kind is, and how
// much it grows at a time.
var sizes = map[Kind]struct{ least, most, growth int64 }{
	Block: {16 * mib, 48 * mib, 8 * mib},
	Ext4:  {32 * mib, 96 * mib, 16 * mib},
	XFS:   {300 * mib, 340 * mib, 32 * mib},
	Btrfs: {256 * mib, 288 * mib, 32 * mib},
}

// Plan makes up n operations that can be asked for one after the other, and those
// at once of which none [Operation.Waits] for another.
func (p *Planner) Plan(n int) []Operation {
	var plan []Operation
	for len(plan) < n {
		o, ok := p.propose()
		if !ok || o.Allowed(p.World) != nil {
			continue
		}
		after := p.World.Clone()
		if o.GiveUp {
			o.create(after)
		} else {
			o.Apply(after)
		}
		if after.Most() > p.Room {
			continue
		}
		plan = append(plan, p.add(o))
	}
	return plan
}

// add numbers an operation and applies it.
func (p *Planner) add(o Operation) Operation {
	p.number++
	o.Number = p.number
	o.Apply(p.World)
	return o
}

// propose makes up an operation, which may turn out to be impossible.
func (p *Planner) propose() (Operation, bool) {
	weights := []struct {
		weight int
		action Action
	}{
		{14, Create}, {8, Delete}, {3, DeleteInUse}, {1, CreateTooLarge},
		{10, TakeSnapshot}, {8, DeleteSnapshot}, {6, SnapshotGroup}, {2, DeleteGroup},
		{6, Grow}, {6, GrowDevice}, {16, Stage}, {16, Publish}, {10, Unpublish}, {9, Unstage},
		{8, Write}, {3, List},
	}
	total := 0
	for _, w := range weights {
		total += w.weight
	}
	at := p.Random.IntN(total)
	for _, w := range weights {
		if at -= w.weight; at < 0 {
			return p.detail(Operation{Action: w.action})
		}
	}
	return Operation{}, false
}

// detail says of what an operation is.
func (p *Planner) detail(o Operation) (Operation, bool) {
	r := p.Random
	switch o.Action {
	case Create:
		return p.newVolume(o)
	case CreateTooLarge:
		o.Volume, o.Kind, o.Size = "too-large", Block, p.Room*4
	case TakeSnapshot:
		if len(p.World.Snapshots) >= mostSnapshots {
			return o, false
		}
		o.Volume, o.Snapshot = p.volume(), p.fresh("s")
		p.trouble(&o, true)
	case DeleteSnapshot:
		o.Snapshot = p.snapshot()
		p.trouble(&o, false)
	case SnapshotGroup:
		if len(p.World.Snapshots) >= mostSnapshots {
			return o, false
		}
		written := map[string]*Volume{}
		for name, v := range p.World.Volumes {
			if v.Published == Writable {
				written[name] = v
			}
		}
		for range 2 + r.IntN(3) {
			m := p.volume()
			if len(written) > 0 && r.IntN(4) > 0 {
				m = pick(r, written)
			}
			// A kill at the wrong instant leaves a btrfs of a group read-only:
			// docs/limitations.md.
			if m != "" && p.World.Volumes[m].Kind != Btrfs && !slices.Contains(o.Members, m) {
				o.Members = append(o.Members, m)
			}
		}
		slices.Sort(o.Members)
		for _, m := range o.Members {
			if p.World.Volumes[m].Kind == Block {
				o.Raw = append(o.Raw, m)
			}
		}
		o.Group = p.fresh("g")
		p.trouble(&o, true)
	case DeleteGroup:
		if s := p.World.Snapshots[p.snapshot()]; s != nil && s.Group != "" {
			o.Group = s.Group
			for m := range p.World.Members(o.Group) {
				o.Members = append(o.Members, m)
			}
			slices.Sort(o.Members)
		}
		p.trouble(&o, false)
	case Grow:
		o.Volume = p.volume()
		if v := p.World.Volumes[o.Volume]; v != nil {
			if v.Size >= sizes[v.Kind].most+4*sizes[v.Kind].growth {
				return o, false
			}
			o.Size = v.Size + sizes[v.Kind].growth
		}
		p.trouble(&o, false)
	case Publish:
		o.Volume, o.Access = p.volume(), Writable
		if r.IntN(5) == 0 {
			o.Access = ReadOnly
		}
		p.trouble(&o, false)
	case Write:
		o.Volume, o.Seed, o.Size = p.volume(), r.Uint64(), (1+r.Int64N(2))*mib
		if v := p.World.Volumes[o.Volume]; v == nil || len(v.Content.Fills) >= mostFills {
			return o, false
		}
	case List:
		o.Page = int32(r.IntN(6))
	case Delete, DeleteInUse, GrowDevice, Stage, Unpublish, Unstage:
		o.Volume = p.volume()
		p.trouble(&o, false)
	}
	return o, true
}

// newVolume is a volume under a name that may have been another's before.
func (p *Planner) newVolume(o Operation) (Operation, bool) {
	r := p.Random
	if len(p.World.Volumes) >= mostVolumes {
		return o, false
	}
	o.Volume = fmt.Sprintf("v%d", r.IntN(2*mostVolumes))
	o.Kind = []Kind{Block, Ext4, Ext4, XFS, Btrfs}[r.IntN(5)]
	o.Size = sizes[o.Kind].least + r.Int64N((sizes[o.Kind].most-sizes[o.Kind].least)/mib+1)*mib
	o.Thick = r.IntN(4) == 0
	switch r.IntN(5) {
	case 0, 1:
		if s := p.World.Snapshots[p.snapshot()]; s != nil {
			o.FromSnapshot, o.Kind, o.Size = s.Name, s.Kind, s.Size
		}
	case 2:
		if v := p.World.Volumes[p.volume()]; v != nil {
			o.FromVolume, o.Kind, o.Size = v.Name, v.Kind, v.Size
		}
	}
	if o.FromSnapshot+o.FromVolume != "" && r.IntN(2) == 0 {
		o.Size += r.Int64N(4) * sizes[o.Kind].growth
	}
	if len(p.Nodes) > 0 {
		if at := r.IntN(len(p.Nodes) + 1); at < len(p.Nodes) {
			o.Node = p.Nodes[at]
		}
	}
	p.trouble(&o, true)
	return o, true
}

// trouble makes up how an operation is asked for: most are asked for plainly.
func (p *Planner) trouble(o *Operation, canGiveUp bool) {
	r := p.Random
	switch r.IntN(10) {
	case 0:
		o.CallOff = time.Duration(1+r.IntN(60)) * time.Millisecond
	case 1:
		o.Twice = true
	}
	o.GiveUp = canGiveUp && r.IntN(8) == 0
	if o.GiveUp && r.IntN(2) == 0 {
		o.CallOff = time.Duration(1+r.IntN(60)) * time.Millisecond
	}
}

// fresh is a name that nothing had before.
func (p *Planner) fresh(begin string) string {
	if p.counts == nil {
		p.counts = map[string]int{}
	}
	p.counts[begin]++
	return fmt.Sprintf("%s%d", begin, p.counts[begin])
}

// volume picks a volume; there may be none.
func (p *Planner) volume() string { return pick(p.Random, p.World.Volumes) }

func (p *Planner) snapshot() string { return pick(p.Random, p.World.Snapshots) }

func pick[T any](r *rand.Rand, m map[string]T) string {
	if len(m) == 0 {
		return ""
	}
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names[r.IntN(len(names))]
}

// Look makes up what it takes to see the data of everything that there is: each
// volume is published, and each snapshot restored for that.
func (p *Planner) Look() []Operation {
	var plan []Operation
	do := func(o Operation) { plan = append(plan, p.add(o)) }
	for _, name := range sorted(p.World.Volumes) {
		p.release(name, do)
		do(Operation{Action: Stage, Volume: name})
		do(Operation{Action: Publish, Volume: name, Access: ReadOnly})
		p.release(name, do)
	}
	for i, name := range sorted(p.World.Snapshots) {
		s, copied := p.World.Snapshots[name], fmt.Sprintf("look-%d", i)
		do(Operation{Action: Create, Volume: copied, Kind: s.Kind, Size: s.Size, FromSnapshot: name})
		do(Operation{Action: Stage, Volume: copied})
		do(Operation{Action: Publish, Volume: copied, Access: ReadOnly})
		p.release(copied, do)
		do(Operation{Action: Delete, Volume: copied})
	}
	return plan
}

// Clear makes up what it takes to be rid of everything.
func (p *Planner) Clear() []Operation {
	var plan []Operation
	do := func(o Operation) { plan = append(plan, p.add(o)) }
	for _, name := range sorted(p.World.Volumes) {
		p.release(name, do)
		do(Operation{Action: Delete, Volume: name})
	}
	for _, name := range sorted(p.World.Snapshots) {
		s := p.World.Snapshots[name]
		switch {
		case s == nil: // went with its group
		case s.Group != "":
			do(Operation{Action: DeleteGroup, Group: s.Group, Members: sorted(p.World.Members(s.Group))})
		default:
			do(Operation{Action: DeleteSnapshot, Snapshot: name})
		}
	}
	return plan
}

// release takes a volume out of use.
func (p *Planner) release(name string, do func(Operation)) {
	v := p.World.Volumes[name]
	if v.Published != Nowhere {
		do(Operation{Action: Unpublish, Volume: name})
	}
	if v.Staged {
		do(Operation{Action: Unstage, Volume: name})
	}
}

func sorted[T any](m map[string]T) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
