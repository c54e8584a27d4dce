// Package pool is the contract of the storage engine: what a volume and a
// snapshot are, what an engine must do with them, which operations may overlap,
// and how the pools of one node are found by ID and by name.
//
// It knows no gRPC and no Kubernetes, and it does no I/O of its own. How a pool
// makes a block device is the business of an engine alone; package image is the
// one that makes it of a file and a loop device.
package pool

import (
	"context"
	"iter"
	"time"
)

// Engine is one pool: a stock of volumes and snapshots on one piece of storage
// that one process owns.
//
// Every method may be called from many goroutines. Calls that concern the same
// volume are kept from overlapping by the caller, through [Operations]; an
// engine need only keep its own bookkeeping consistent, and holds no lock
// across I/O that another volume needs.
//
// Every method can be repeated after a crash at any instruction: it begins by
// looking whether it is already so. A nil error means that the result is on
// stable storage. A name that is not in the pool is ErrNotFound, except to
// DeleteVolume and DeleteSnapshot, for which it is success. A volume whose
// metadata cannot be trusted is ErrDamaged to all of them, and is never
// altered.
type Engine interface {
	// Info tells what the pool is. It never changes while the pool is open.
	Info() Info
	// Capacity tells the pool's room as of now, in bytes. One that takes
	// nothing, because its filesystem has failed or is read-only, is
	// ErrUnavailable.
	Capacity(ctx context.Context) (Capacity, error)
	// Health lists what is wrong with the pool as a whole; empty is healthy.
	Health(ctx context.Context) []Condition

	// CreateVolume makes a volume, or finds the one that an earlier call with
	// the same spec made. A size that does not fit is ErrNoSpace; the same
	// RequestName with another spec is ErrExists; a source that is attached
	// to a device and cannot be cut at one instant is ErrPrecondition.
	CreateVolume(ctx context.Context, spec VolumeSpec) (Volume, error)
	// DeleteVolume removes a volume that is proven idle, else ErrInUse. The
	// space is freed in the background.
	DeleteVolume(ctx context.Context, name string) error
	// GrowVolume makes a volume at least size bytes long. It never shrinks.
	// The device of an attached volume follows at the next Attach.
	GrowVolume(ctx context.Context, name string, size int64) (Volume, error)
	// SetContent records what the volume's bytes are known to be.
	SetContent(ctx context.Context, name string, content Content) error
	// SetLimits records what the volume's I/O is limited to. It enforces
	// nothing.
	SetLimits(ctx context.Context, name string, limits Limits) (Volume, error)
	// Volume finds one volume.
	Volume(name string) (Volume, error)
	// Volumes lists the volumes whose name is greater than after, ordered by
	// name, at most max of them; max 0 is all. Damaged ones are not listed.
	Volumes(after string, max int) []Volume
	// VolumesHealth lists what is wrong with volumes, damaged ones too, of
	// those names. What is healthy, or not there, is not in the answer.
	VolumesHealth(ctx context.Context, names []string) (map[string][]Condition, error)
	// Damaged lists the names of volumes that are in the pool but cannot be
	// used, ordered.
	Damaged() []string
	// Counts tells how much the pool holds, without listing it.
	Counts() Counts

	// Attach makes the volume's bytes a block device, or finds the device
	// that it already is, and brings the device to the volume's size. A
	// volume has at most one writable and one read-only device; a read-only
	// one is read-only in the kernel, and what was written to the other
	// before can be read from it.
	Attach(ctx context.Context, name string, readOnly bool) (Device, error)
	// Devices lists the devices that the volume is attached to, as the kernel
	// tells it; the writable one first. It works for damaged volumes too, and
	// so does Detach: their users must be able to leave.
	Devices(name string) ([]Device, error)
	// Attached lists the devices of those of the named volumes that are
	// attached, by name, as Devices does of one.
	Attached(names []string) (map[string][]Device, error)
	// Detach takes one device of the volume away once it is proven idle, else
	// ErrInUse. All that was written to it is on stable storage before.
	Detach(ctx context.Context, name string, device Device) error
	// Blank reports whether the volume provably holds nothing but zeros,
	// without reading it.
	Blank(name string) (bool, error)
	// Zero makes the whole volume read as zeros. An attached one is ErrInUse.
	Zero(ctx context.Context, name string) error

	// CreateSnapshot cuts a read-only image of a volume at one instant, or
	// finds the one that an earlier call with the same spec cut. Mounted
	// filesystems are frozen for the cut, and thawed whatever happens.
	CreateSnapshot(ctx context.Context, spec SnapshotSpec) (Snapshot, error)
	// PrepareSnapshots begins to cut several volumes at one instant: room for
	// all snapshots is promised, and what can be done before their writers are
	// held is done. A name that is taken is ErrExists.
	PrepareSnapshots(ctx context.Context, specs []SnapshotSpec) (Cutting, error)
	// Thaw lets all writers go on that a snapshot holds back, at once, for a
	// process that ends before its calls have.
	Thaw()
	// DeleteSnapshot removes a snapshot. Volumes made from it are unaffected.
	DeleteSnapshot(ctx context.Context, name string) error
	// Snapshot finds one snapshot.
	Snapshot(name string) (Snapshot, error)
	// Snapshots lists snapshots as Volumes lists volumes.
	Snapshots(after string, max int) []Snapshot
	// Allocated gives the ranges of a snapshot from that offset on that have
	// been written; all else reads as zeros. It reads none of its bytes.
	Allocated(ctx context.Context, snapshot string, from int64) iter.Seq2[Range, error]
	// Changed gives the ranges of the target from that offset on that may
	// differ from the base: all that do, and of those that do not only what
	// was written again. What the target has behind the base's end counts as
	// zeros in the base. It reads none of their bytes. Both must be of this
	// pool, and of one volume; a pool that cannot reflink is ErrPrecondition,
	// because its snapshots share nothing to tell by.
	//
	// Of both methods: ranges are ordered, not empty, apart from each other,
	// and within the snapshot's size. An error ends them, and what follows
	// the last range is then unknown. The caller keeps the snapshots from
	// being deleted until the end.
	Changed(ctx context.Context, base, target string, from int64) iter.Seq2[Range, error]

	// Read gives what a snapshot has from an offset on, as [Remote.Read] wants
	// it. The caller keeps the snapshot from being deleted until the end.
	Read(ctx context.Context, snapshot string, from int64) iter.Seq2[Piece, error]
	// Copies lists the names of volumes whose copy from a [Remote] did not
	// come to its end, ordered. What has arrived of them is kept, and their
	// room is promised, for CreateVolume to go on.
	Copies() []string
	// DropCopy gives up what has arrived of such a volume.
	DropCopy(name string) error

	// Close stops background work and gives the pool up. What is attached
	// stays attached.
	Close() error
}

// Info identifies a pool.
type Info struct {
	ID      string // random, made with the pool, stable on disk
	Name    string // as the configuration calls it
	Reflink bool   // snapshots and clones share blocks and take no time
}

// Capacity is a pool's room in bytes.
type Capacity struct {
	Total       int64 // what the pool could hold, without the filesystem's own needs
	Reserve     int64 // kept free on purpose
	Provisioned int64 // promised: volumes at their full size, snapshots at what they may come to hold alone
	Used        int64 // blocks in use now
	Available   int64 // what a new volume may be promised; never negative
	Thick       int64 // the same for a thick one: less where the pool is overcommitted
}

// Counts tells how much a pool holds.
type Counts struct {
	Volumes, Snapshots, Damaged int
}

// Provisioning says when a volume's blocks are taken from the pool.
type Provisioning string

// The ways of provisioning.
const (
	Thin  Provisioning = "thin"  // as they are written
	Thick Provisioning = "thick" // all at creation
)

// Access is how a volume is handed to its user.
type Access string

// The ways of access.
const (
	AccessFilesystem Access = "filesystem"
	AccessBlock      Access = "block"
)

// Content is what the driver knows of a volume's bytes. It decides whether the
// volume may be formatted: only Empty (if the engine proves it blank) and
// Formatting (after Zero) may.
type Content string

// The states of a volume's bytes.
const (
	ContentEmpty      Content = "empty"      // never written through the driver
	ContentFormatting Content = "formatting" // mkfs was begun and is not known to have ended; never mounted
	ContentFilesystem Content = "filesystem" // a filesystem that the driver made or adopted
	ContentGrowing    Content = "growing"    // such a one, which is being made larger and may have been cut off in it; not mounted since
	ContentCopied     Content = "copied"     // bytes of another volume, not mounted since
	ContentRaw        Content = "raw"        // a block volume that its user may have written
)

// Source is what a volume was made from. The zero value is nothing.
type Source struct {
	SnapshotID string `json:"snapshotID,omitempty"`
	VolumeID   string `json:"volumeID,omitempty"`
}

// Volume is what a pool knows of one volume.
type Volume struct {
	ID           string       `json:"id"`
	Name         string       `json:"name"`        // unique in the pool; see [NameFor]
	RequestName  string       `json:"requestName"` // as CreateVolume asked for it
	Size         int64        `json:"size"`        // bytes, a multiple of SizeUnit
	Provisioning Provisioning `json:"provisioning"`
	Access       Access       `json:"access"`
	Filesystem   string       `json:"filesystem,omitempty"`  // type; empty for block access
	MkfsOptions  string       `json:"mkfsOptions,omitempty"` // words for mkfs, separated by blanks
	Ephemeral    bool         `json:"ephemeral,omitempty"`   // lives and dies with one pod
	Source       Source       `json:"source,omitzero"`
	Limits       Limits       `json:"limits,omitzero"`
	Content      Content      `json:"content"`
	Created      time.Time    `json:"created"`
}

// VolumeSpec asks for a volume.
type VolumeSpec struct {
	RequestName  string
	ID           string // only for an ephemeral volume, whose ID the orchestrator makes; else empty
	Size         int64  // bytes, a multiple of SizeUnit
	MaxSize      int64  // an existing volume of that name may be this large; 0 is any size
	Provisioning Provisioning
	Access       Access
	Filesystem   string
	MkfsOptions  string
	Ephemeral    bool
	Source       Source  // of the same pool, unless there is a Remote
	Remote       *Remote // where the bytes of the source are, if it is elsewhere
	Limits       Limits
}

// Snapshot is what a pool knows of one snapshot.
type Snapshot struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	RequestName string    `json:"requestName"`
	SourceID    string    `json:"sourceID"` // the volume's ID
	Size        int64     `json:"size"`     // of the volume when it was cut, bytes
	Access      Access    `json:"access"`
	Filesystem  string    `json:"filesystem,omitempty"`
	Content     Content   `json:"content"`           // of the volume when it was cut
	Created     time.Time `json:"created"`           // the instant of the cut
	Group       *Group    `json:"group,omitempty"`   // that it was cut with
	ForCopy     bool      `json:"forCopy,omitempty"` // only there to be copied to another pool; not listed
}

// SnapshotSpec asks for a snapshot.
type SnapshotSpec struct {
	RequestName string
	Volume      string // name in the same pool
	ForCopy     bool   // see Snapshot
	Group       *Group // to cut it with; nil is none
}

// Range is a run of a volume's or snapshot's bytes.
type Range struct {
	Offset, Length int64 // bytes
}

// Device is a block device that a volume is attached to.
type Device struct {
	Path     string // in /dev
	Number   uint64 // dev_t, as in stat.Rdev and in mountinfo's major:minor
	ReadOnly bool
	DirectIO bool // false: the data passes the page cache twice
}

// Severity says what a [Condition] means to a volume's user, with the words of
// the CSI specification's VolumeHealthErrorType.
type Severity int

// The severities.
const (
	Degraded     Severity = iota + 1 // usable, but not as it should be
	Inaccessible                     // not usable
	DataLoss                         // data is known or suspected to be gone
)

func (s Severity) String() string {
	return [...]string{"none", "degraded", "inaccessible", "data_loss"}[s]
}

// Condition is one thing that is wrong.
type Condition struct {
	Severity Severity
	Reason   string // brief, CamelCase, for machines
	Message  string // what is wrong and what to do about it
}

// SizeUnit is the logical block size of every volume's device, in bytes, and so
// what every volume's size is a multiple of. It is the largest that disks have,
// so that a volume fits any of them.
const SizeUnit = 4096
