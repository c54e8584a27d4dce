package model

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Action is what an operation does.
type Action string

// The actions.
const (
	Create         Action = "create"          // a volume, empty or of a source
	Delete         Action = "delete"          // a volume
	DeleteInUse    Action = "delete in use"   // a volume that is staged: refused
	CreateTooLarge Action = "create too big"  // a volume for which there is no room: refused
	TakeSnapshot   Action = "snapshot"        // of a volume
	DeleteSnapshot Action = "delete snapshot" // that is not of a group
	SnapshotGroup  Action = "group snapshot"  // of several volumes
	DeleteGroup    Action = "delete group"    // all its snapshots
	Grow           Action = "grow"            // a volume
	GrowDevice     Action = "grow device"     // and filesystem, of a volume that is staged
	Stage          Action = "stage"
	Publish        Action = "publish"   // and look at the data; writable, also write
	Unpublish      Action = "unpublish" // stop writing first
	Unstage        Action = "unstage"
	Write          Action = "fill" // bytes at rest
	List           Action = "list" // volumes and snapshots
)

// Operation is one call, or what an orchestrator does until it has an answer.
type Operation struct {
	Number   int      // in the plan
	Action   Action   // and of what:
	Volume   string   `json:",omitempty"`
	Snapshot string   `json:",omitempty"`
	Group    string   `json:",omitempty"`
	Members  []string `json:",omitempty"` // volumes of the group
	Raw      []string `json:",omitempty"` // those of them that are block volumes

	// Of a new volume.
	Kind         Kind   `json:",omitempty"`
	Size         int64  `json:",omitempty"` // bytes; also what a volume grows to
	Thick        bool   `json:",omitempty"`
	FromSnapshot string `json:",omitempty"`
	FromVolume   string `json:",omitempty"`
	Node         string `json:",omitempty"` // where it must be; empty is anywhere

	Access Access `json:",omitempty"` // of a publication
	Seed   uint64 `json:",omitempty"` // of a fill
	Page   int32  `json:",omitempty"` // entries of a list that is asked for at once

	// How it is asked for.
	CallOff time.Duration `json:",omitempty"` // the first call is called off after that; 0 is not
	Twice   bool          `json:",omitempty"` // two calls at once
	GiveUp  bool          `json:",omitempty"` // whatever comes of it is undone at once
}

func (o Operation) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "#%d %s", o.Number, o.Action)
	for _, part := range []struct{ name, value string }{
		{"", o.Volume}, {"", o.Snapshot}, {"", o.Group}, {"from snapshot ", o.FromSnapshot}, {"from volume ", o.FromVolume},
		{"on ", o.Node}, {"", string(o.Kind)}, {"", string(o.Access)},
	} {
		if part.value != "" {
			text.WriteString(" " + part.name + part.value)
		}
	}
	if len(o.Members) > 0 {
		fmt.Fprintf(&text, " of %v", o.Members)
	}
	if o.Size > 0 {
		fmt.Fprintf(&text, " %d bytes", o.Size)
	}
	for _, flag := range []struct {
		set  bool
		name string
	}{{o.Thick, "thick"}, {o.CallOff > 0, "called off"}, {o.Twice, "twice"}, {o.GiveUp, "given up"}} {
		if flag.set {
			text.WriteString(", " + flag.name)
		}
	}
	return text.String()
}

// Allowed is an error if the operation cannot be asked for in this world.
func (o Operation) Allowed(w *World) error {
	no := func(format string, args ...any) error {
		return fmt.Errorf("%s: %s", o, fmt.Sprintf(format, args...))
	}
	v := w.Volumes[o.Volume]
	switch o.Action {
	case List, CreateTooLarge:
		return nil
	case Create:
		if v != nil {
			return no("there is one already")
		}
		return o.mayCopy(w, no)
	case DeleteSnapshot:
		if s := w.Snapshots[o.Snapshot]; s == nil || s.Group != "" {
			return no("there is none that stands alone")
		}
		return nil
	case DeleteGroup:
		if len(w.Members(o.Group)) == 0 {
			return no("there is none")
		}
		return nil
	case SnapshotGroup:
		if len(o.Members) == 0 || len(w.Members(o.Group)) > 0 || slices.ContainsFunc(o.Members, func(m string) bool { return w.Volumes[m] == nil }) {
			return no("it exists, or a volume does not")
		}
		return nil
	default:
	}
	if v == nil {
		return no("there is none")
	}
	allowed := map[Action]bool{
		Delete:       !v.Staged,
		DeleteInUse:  v.Staged,
		TakeSnapshot: w.Snapshots[o.Snapshot] == nil,
		Grow:         o.Size > v.Size,
		GrowDevice:   v.Staged,
		Stage:        !v.Staged,
		Publish:      v.Staged && v.Published == Nowhere && o.Access != Nowhere,
		Unpublish:    v.Published != Nowhere,
		Unstage:      v.Staged && v.Published == Nowhere,
		Write:        v.Published == Writable,
	}
	if !allowed[o.Action] {
		return no("the volume is %+v", *v)
	}
	return nil
}

func (o Operation) mayCopy(w *World, no func(string, ...any) error) error {
	kind, size := o.Kind, int64(0)
	switch {
	case o.FromSnapshot != "":
		s := w.Snapshots[o.FromSnapshot]
		if s == nil {
			return no("there is no such snapshot")
		}
		kind, size = s.Kind, s.Size
	case o.FromVolume != "":
		source := w.Volumes[o.FromVolume]
		if source == nil {
			return no("there is no such volume")
		}
		kind, size = source.Kind, source.Size
	}
	if kind != o.Kind || size > o.Size {
		return no("the source is %s of %d bytes", kind, size)
	}
	return nil
}

// Members gives the snapshots of a group, by volume.
func (w *World) Members(group string) map[string]*Snapshot {
	members := map[string]*Snapshot{}
	for _, s := range w.Snapshots {
		if group != "" && s.Group == group {
			members[s.Volume] = s
		}
	}
	return members
}

// Apply has the operation's effect on the world. What copies contain is for
// [World.Made] to say.
func (o Operation) Apply(w *World) {
	for _, step := range o.steps() {
		step(w)
	}
}

// steps are the changes that the operation makes, one after the other.
func (o Operation) steps() []func(*World) {
	one := func(change func(*World)) []func(*World) { return []func(*World){change} }
	volume := func(change func(*Volume)) []func(*World) {
		return one(func(w *World) { change(w.Volumes[o.Volume]) })
	}
	switch o.Action {
	case Create, TakeSnapshot, SnapshotGroup:
		steps := one(o.create)
		if o.GiveUp {
			steps = append(steps, o.undo)
		}
		return steps
	case Delete:
		return one(func(w *World) { delete(w.Volumes, o.Volume) })
	case DeleteSnapshot:
		return one(func(w *World) { delete(w.Snapshots, o.Snapshot) })
	case DeleteGroup:
		return one(func(w *World) {
			for _, s := range w.Members(o.Group) {
				delete(w.Snapshots, s.Name)
			}
		})
	case Grow:
		return volume(func(v *Volume) { v.Size = o.Size })
	case GrowDevice:
		return volume(func(v *Volume) { v.Device, v.Reader = v.Size, v.Size })
	case Stage:
		return volume(func(v *Volume) { v.Staged, v.Device = true, v.Size })
	case Publish:
		return volume(func(v *Volume) { v.Published, v.Reader = o.Access, v.Size })
	case Unpublish:
		return volume(func(v *Volume) { v.Published = Nowhere })
	case Unstage:
		return volume(func(v *Volume) { v.Staged, v.Device = false, 0 })
	case Write:
		return volume(func(v *Volume) {
			v.Content.Fills = append(slices.Clip(v.Content.Fills), Fill{o.Seed, o.Size})
		})
	case DeleteInUse, CreateTooLarge, List:
	}
	return nil
}

func (o Operation) create(w *World) {
	switch o.Action {
	case Create:
		v := &Volume{Name: o.Volume, Kind: o.Kind, Size: o.Size, Thick: o.Thick, Born: o.Number, Content: NewContent()}
		if s := w.Snapshots[o.FromSnapshot]; s != nil {
			v.Content = s.Content
		} else if source := w.Volumes[o.FromVolume]; source != nil {
			v.Content = Copy(source.Content.Seen(), source.Content.Seen())
		}
		w.Volumes[o.Volume] = v
	case TakeSnapshot:
		w.cut(o.Snapshot, "", o.Volume, o.Number)
	case SnapshotGroup:
		for _, m := range o.Members {
			w.cut(o.Group+"/"+m, o.Group, m, o.Number)
		}
	default:
		panic(o.Action)
	}
}

func (w *World) cut(name, group, volume string, number int) {
	v := w.Volumes[volume]
	w.Snapshots[name] = &Snapshot{
		Name: name, Volume: volume, Group: group, Kind: v.Kind, Size: v.Size, Born: number, Of: v.Born,
		Content: Copy(v.Content.Seen(), v.Content.Seen()),
	}
}

func (o Operation) undo(w *World) {
	switch o.Action {
	case Create:
		delete(w.Volumes, o.Volume)
	case TakeSnapshot:
		delete(w.Snapshots, o.Snapshot)
	case SnapshotGroup:
		for _, m := range o.Members {
			delete(w.Snapshots, o.Group+"/"+m)
		}
	default:
		panic(o.Action)
	}
}

// Sources gives the volumes that the operation takes a copy of.
func (o Operation) Sources() []string {
	switch o.Action {
	case Create:
		if o.FromVolume != "" {
			return []string{o.FromVolume}
		}
	case TakeSnapshot:
		return []string{o.Volume}
	case SnapshotGroup:
		return o.Members
	default:
	}
	return nil
}

// Made applies an operation that has copied volumes, whose contents were seen to be
// asked, by the volumes' names, when it was first asked for.
func (o Operation) Made(w *World, asked map[string]Content) {
	o.Apply(w)
	if o.GiveUp {
		return
	}
	copied := func(source string) Content { return Copy(asked[source], w.Volumes[source].Content.Seen()) }
	for _, source := range o.Sources() {
		switch o.Action {
		case Create:
			w.Volumes[o.Volume].Content = copied(source)
		case TakeSnapshot:
			w.Snapshots[o.Snapshot].Content = copied(source)
		case SnapshotGroup:
			w.Snapshots[o.Group+"/"+source].Content = copied(source)
		default:
		}
	}
}

// hold is what an operation does to something while it is under way.
type hold int

const (
	whole hold = iota // make or remove it
	cut               // copy it
	still             // copy it while nobody writes to it
	grow              // make it larger
	use               // change where it is in use
	fill              // write to it
)

// overlaps tells whether two operations on one thing may be under way at once,
// so that what comes of them does not depend on which is the first.
func (h hold) overlaps(other hold) bool {
	switch {
	case h > other:
		return other.overlaps(h)
	case h == cut:
		return other == cut || other == still || other == use
	case h == still:
		return other == still
	case h == grow:
		return other == fill
	default:
		return false
	}
}

func (o Operation) holds() map[string]hold {
	holds := map[string]hold{}
	switch o.Action {
	case Create:
		holds[FactVolume+o.Volume] = whole
		if o.FromSnapshot != "" {
			holds[FactSnapshot+o.FromSnapshot] = cut
		}
		if o.FromVolume != "" {
			holds[FactVolume+o.FromVolume] = cut
		}
	case Delete:
		holds[FactVolume+o.Volume] = whole
	case TakeSnapshot:
		holds[FactSnapshot+o.Snapshot] = whole
		holds[FactVolume+o.Volume] = cut
	case DeleteSnapshot:
		holds[FactSnapshot+o.Snapshot] = whole
	case SnapshotGroup:
		for _, m := range o.Members {
			holds[FactVolume+m] = cut
			if slices.Contains(o.Raw, m) {
				holds[FactVolume+m] = still
			}
			holds[FactSnapshot+o.Group+"/"+m] = whole
		}
		holds[FactSnapshot+o.Group] = whole
	case DeleteGroup:
		holds[FactSnapshot+o.Group] = whole
		for _, m := range o.Members {
			holds[FactSnapshot+o.Group+"/"+m] = whole
		}
	case Grow:
		holds[FactVolume+o.Volume] = grow
	case GrowDevice, Stage, Publish, Unpublish, Unstage, DeleteInUse:
		holds[FactVolume+o.Volume] = use
	case Write:
		holds[FactVolume+o.Volume] = fill
	case CreateTooLarge, List:
	}
	return holds
}

// Waits tells whether the operation must wait until another, which comes before it
// in the plan, has ended.
func (o Operation) Waits(other Operation) bool {
	holds := other.holds()
	for name, h := range o.holds() {
		if before, both := holds[name]; both && !h.overlaps(before) {
			return true
		}
	}
	return false
}
