package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// freezeLimit bounds how long a volume's filesystem is waited for to freeze,
// and how long it stays frozen.
const freezeLimit = 10 * time.Second

// freezeMark is the beginning of the name of a file in .staging that says which
// volume is frozen. It need not survive a power failure: no freeze does.
const freezeMark = "freeze-"

// Snapshot implements [pool.Engine].
func (e *Engine) Snapshot(name string) (pool.Snapshot, error) {
	s, err := e.snapshot(name)
	return s.Snapshot, err
}

func (e *Engine) snapshot(name string) (snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s, ok := e.snapshots.get(name); ok {
		return s, nil
	}
	if d, ok := e.damagedSnapshots.get(name); ok {
		return snapshot{}, e.damaged(snapshotsDir, name, d)
	}
	return snapshot{}, pool.Errorf(pool.ErrNotFound, "snapshot %s does not exist in pool %s", name, e.info.Name)
}

// Snapshots implements [pool.Engine].
func (e *Engine) Snapshots(after string, max int) []pool.Snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	entries := e.snapshots.list(after, max)
	list := make([]pool.Snapshot, len(entries))
	for i, s := range entries {
		list[i] = s.Snapshot
	}
	return list
}

// CreateSnapshot implements [pool.Engine].
//
// What a snapshot may come to hold alone is what its volume has in blocks at
// the cut: all of it, once the volume is overwritten. That much is promised.
func (e *Engine) CreateSnapshot(ctx context.Context, spec pool.SnapshotSpec) (pool.Snapshot, error) {
	name := pool.NameFor(spec.RequestName)
	existing, err := e.Snapshot(name)
	if err == nil {
		return existing, mustBeOf(existing, spec)
	}
	if !errors.Is(err, pool.ErrNotFound) {
		return pool.Snapshot{}, err
	}
	v, err := e.Volume(spec.Volume)
	if err != nil {
		return pool.Snapshot{}, err
	}
	s := snapshot{
		Snapshot: pool.Snapshot{
			ID:          pool.ID{Node: e.segment, Pool: e.info.ID, Name: name}.String(),
			Name:        name,
			RequestName: spec.RequestName,
			SourceID:    v.ID,
			Size:        v.Size,
			Access:      v.Access,
			Filesystem:  v.Filesystem,
			Content:     v.Content,
		},
		charge: e.blocks(path.Join(volumesDir, v.Name, dataFile)),
	}
	if err := e.promise(ctx, s.charge, pool.Thin, "snapshot "+name); err != nil {
		return pool.Snapshot{}, err
	}
	if err := e.makeSnapshot(ctx, &s, v); err != nil {
		e.ledger.give(s.charge, pool.Thin)
		return pool.Snapshot{}, fmt.Errorf("creating snapshot %s: %w", name, err)
	}
	// The volume may have been written since it was measured.
	charge := e.blocks(path.Join(snapshotsDir, name, dataFile))
	e.ledger.add(charge-s.charge, pool.Thin)
	s.charge = charge
	e.mu.Lock()
	defer e.mu.Unlock()
	e.snapshots.put(name, s)
	return s.Snapshot, nil
}

func mustBeOf(s pool.Snapshot, spec pool.SnapshotSpec) error {
	source, err := pool.ParseID(s.SourceID)
	if err != nil {
		return err
	}
	if s.RequestName != spec.RequestName || source.Name != spec.Volume {
		return pool.Errorf(pool.ErrExists, "snapshot %s exists, of volume %s", s.ID, s.SourceID)
	}
	return nil
}

func (e *Engine) makeSnapshot(ctx context.Context, s *snapshot, v pool.Volume) error {
	return e.make(path.Join(snapshotsDir, s.Name), snapshotFile, func(data *os.File) (any, error) {
		at, err := e.take(ctx, data, &origin{path.Join(volumesDir, v.Name), v.Name, v.Size, v.Content})
		if err != nil {
			return nil, err
		}
		s.Created = at.UTC()
		return s.Snapshot, nil
	})
}

// DeleteSnapshot implements [pool.Engine].
func (e *Engine) DeleteSnapshot(_ context.Context, name string) error {
	s, err := e.snapshot(name)
	if errors.Is(err, pool.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := e.discard(path.Join(snapshotsDir, name)); err != nil {
		return fmt.Errorf("deleting snapshot %s: %w", name, err)
	}
	e.mu.Lock()
	e.snapshots.remove(name)
	e.mu.Unlock()
	e.ledger.give(s.charge, pool.Thin)
	return nil
}

// take fills an empty image with the source's bytes as they are at one instant,
// and tells when that was.
//
// What is known of the bytes must be true of the instant: a volume that was
// being formatted when the call began may have been mounted and written since,
// and a copy of it that says "formatting" would be zeroed at its first use.
func (e *Engine) take(ctx context.Context, dst *os.File, from *origin) (at time.Time, err error) {
	if at, err = e.read(ctx, dst, from); err != nil || from.volume == "" {
		return at, err
	}
	v, err := e.Volume(from.volume)
	if err == nil && v.Content != from.content {
		err = pool.Errorf(pool.ErrBusy, "volume %s was put to its first use just now; repeat the call", from.volume)
	}
	return at, err
}

func (e *Engine) read(ctx context.Context, dst *os.File, from *origin) (at time.Time, err error) {
	src, err := e.open(path.Join(from.dir, dataFile), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, pool.Errorf(pool.ErrDamaged, "the source's image is missing: %w", err)
	}
	if err != nil {
		return time.Time{}, err
	}
	defer src.Close()
	if info, err := src.Stat(); err != nil || info.Size() < from.size {
		return time.Time{}, errors.Join(err, pool.Errorf(pool.ErrDamaged, "the source's image is shorter than its %d bytes", from.size))
	}
	writable, err := e.writableDevice(src, from)
	if err != nil {
		return time.Time{}, err
	}
	if !e.info.Reflink {
		if writable != nil {
			return time.Time{}, pool.Errorf(pool.ErrPrecondition, "volume %s is attached, and pool %s is on a filesystem that cannot share blocks (reflink): stop the workload that uses the volume and repeat, or keep such volumes in a pool on XFS or btrfs (source: file or device makes one)", from.volume, e.info.Name)
		}
		at = time.Now()
		return at, extent.Copy(ctx, dst, src)
	}
	if writable == nil {
		at = time.Now()
		return at, extent.Clone(dst, src)
	}
	return e.cut(ctx, dst, src, from.volume, *writable)
}

// writableDevice finds the device through which the source may be written as we
// read it, or nil.
func (e *Engine) writableDevice(src *os.File, from *origin) (*loop.Device, error) {
	if from.volume == "" {
		return nil, nil
	}
	devices, err := loop.Find(src)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if !d.ReadOnly {
			return &d, nil
		}
	}
	return nil, nil
}

// cut reflinks the image of a volume that is in use. What its filesystem has in
// memory is brought to the image first, and nothing is written while the blocks
// are shared: its writers wait for that long. A volume with no filesystem that
// we see (raw block) is flushed; the reflink itself is atomic.
func (e *Engine) cut(ctx context.Context, dst, src *os.File, volume string, device loop.Device) (at time.Time, err error) {
	mounts, _, err := filesystem.UsesOf(device.Number)
	if err != nil {
		return time.Time{}, err
	}
	if len(mounts) == 0 {
		if err := device.Flush(); err != nil {
			return time.Time{}, err
		}
		at = time.Now()
		return at, extent.Clone(dst, src)
	}
	mark := path.Join(stagingDir, freezeMark+volume)
	marked, err := e.root.OpenFile(mark, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return time.Time{}, noSpace(err)
	}
	marked.Close()
	defer func() { err = errors.Join(err, e.root.Remove(mark)) }()

	freezing, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	thaw, err := filesystem.Freeze(freezing, mounts[0].Path)
	if errors.Is(err, filesystem.ErrFrozen) {
		// Somebody else holds it still (fsfreeze, a backup tool): it is
		// as quiet as we need it, and theirs to thaw.
		at = time.Now()
		return at, extent.Clone(dst, src)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return time.Time{}, pool.Errorf(pool.ErrTimeout, "the filesystem of volume %s did not come to rest in time; repeat when it is less busy: %w", volume, err)
	}
	if err != nil {
		return time.Time{}, err
	}
	watchdog := time.AfterFunc(freezeLimit, func() { _ = thaw() })
	defer watchdog.Stop()
	at = time.Now()
	err = extent.Clone(dst, src)
	if thawErr := thaw(); thawErr != nil {
		err = errors.Join(err, fmt.Errorf("thawing %s: %w", mounts[0].Path, thawErr))
	}
	return at, err
}
