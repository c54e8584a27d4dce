// Package model describes what there must be: the volumes and snapshots that an
// orchestrator has asked a driver for, where they are in use, and what they
// contain; and what each operation needs and changes. It is pure: it does no I/O,
// and knows neither the driver nor CSI.
//
// An operation that was cut off may have had its effect or not, until it is
// repeated to an answer. [World.Allowed] tells all that may be seen meanwhile.
package model

import (
	"fmt"
	"maps"
	"strconv"
)

// Kind is how a volume is used: as a filesystem of that name, or raw.
type Kind string

// The kinds.
const (
	Block Kind = "block"
	Ext4  Kind = "ext4"
	XFS   Kind = "xfs"
	Btrfs Kind = "btrfs"
)

// Volume is a volume that was asked for.
type Volume struct {
	Name  string
	Kind  Kind
	Size  int64 // bytes
	Thick bool

	Born int // number of the operation that made it

	Staged    bool
	Device    int64 // size of its device in bytes, if it is staged
	Reader    int64 // size of the device of a read-only publication, likewise
	Published Access
	Content   Content
}

// Access is how a volume is published.
type Access string

// The ways to publish a volume.
const (
	Nowhere  Access = ""
	Writable Access = "rw"
	ReadOnly Access = "ro"
)

// Snapshot is a snapshot that was asked for, alone or in a group.
type Snapshot struct {
	Name    string // of a group's, the group's name, "/" and the volume's
	Volume  string // its source's name
	Group   string
	Kind    Kind
	Size    int64 // bytes
	Born    int   // number of the operation that made it
	Of      int   // and of the one that made its source
	Content Content
}

// World is all that there is.
type World struct {
	Volumes   map[string]*Volume
	Snapshots map[string]*Snapshot
}

// NewWorld is an empty one.
func NewWorld() *World {
	return &World{Volumes: map[string]*Volume{}, Snapshots: map[string]*Snapshot{}}
}

// Clone is a copy that has a life of its own. What is learnt of contents is known
// to both.
func (w *World) Clone() *World {
	c := &World{Volumes: maps.Clone(w.Volumes), Snapshots: maps.Clone(w.Snapshots)}
	for name, v := range c.Volumes {
		clone := *v
		c.Volumes[name] = &clone
	}
	for name, s := range c.Snapshots {
		clone := *s
		c.Snapshots[name] = &clone
	}
	return c
}

// Most is what all volumes and snapshots may be charged for at most, in bytes.
func (w *World) Most() int64 {
	var sum int64
	for _, v := range w.Volumes {
		sum += v.Size
	}
	for _, s := range w.Snapshots {
		sum += s.Size
	}
	return sum
}

// The facts that can be seen of a world, each with the value that it has.
const (
	FactVolume   = "volume "           // and its name: bytes
	FactSnapshot = "snapshot "         // and its name: its source, and bytes
	FactDevice   = "device "           // and the volume's name: bytes
	FactReader   = "read-only device " // likewise
	FactStaged   = "staged "           // and the volume's name: how
	FactTarget   = "published "        // and the volume's name: how
)

// Facts tells all that can be seen of the world from outside.
func (w *World) Facts() map[string]string {
	facts := map[string]string{}
	for name, v := range w.Volumes {
		facts[FactVolume+name] = strconv.FormatInt(v.Size, 10)
		if !v.Staged {
			continue
		}
		facts[FactDevice+name] = strconv.FormatInt(v.Device, 10)
		if v.Kind != Block {
			facts[FactStaged+name] = string(Writable)
		} else if v.Published == ReadOnly {
			facts[FactReader+name] = strconv.FormatInt(v.Reader, 10)
		}
		if v.Published != Nowhere {
			facts[FactTarget+name] = string(v.Published)
		}
	}
	for name, s := range w.Snapshots {
		facts[FactSnapshot+name] = fmt.Sprintf("of %s, %d", s.Volume, s.Size)
	}
	return facts
}

// Allowed tells which values each fact may have while some operations are under
// way, each of which may be before any of its steps or after the last; "" is that
// there is no such thing. A fact that is not in it must not be.
func (w *World) Allowed(open []Operation) map[string]map[string]bool {
	worlds := []*World{w}
	for _, o := range open {
		for _, before := range worlds {
			for _, step := range o.steps() {
				after := before.Clone()
				step(after)
				worlds = append(worlds, after)
				before = after
			}
		}
	}
	allowed := map[string]map[string]bool{}
	seen := map[string]int{}
	for _, world := range worlds {
		for name, value := range world.Facts() {
			if allowed[name] == nil {
				allowed[name] = map[string]bool{}
			}
			allowed[name][value] = true
			seen[name]++
		}
	}
	for name, n := range seen {
		if n < len(worlds) {
			allowed[name][""] = true
		}
	}
	return allowed
}
