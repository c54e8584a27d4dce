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
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

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
func (e *Engine) CreateSnapshot(ctx context.Context, spec pool.SnapshotSpec) (pool.Snapshot, error) {
	name := pool.NameFor(spec.RequestName)
	existing, err := e.Snapshot(name)
	if err == nil {
		return existing, mustBeOf(existing, spec)
	}
	if !errors.Is(err, pool.ErrNotFound) {
		return pool.Snapshot{}, err
	}
	c, err := e.PrepareSnapshots(ctx, []pool.SnapshotSpec{spec})
	if err != nil {
		return pool.Snapshot{}, err
	}
	made, err := pool.CutTogether(ctx, c)
	if err != nil {
		return pool.Snapshot{}, fmt.Errorf("creating snapshot %s: %w", name, err)
	}
	return made[0], nil
}

func mustBeOf(s pool.Snapshot, spec pool.SnapshotSpec) error {
	source, err := pool.ParseID(s.SourceID)
	if err != nil {
		return err
	}
	if s.RequestName != spec.RequestName || source.Name != spec.Volume || s.Group != nil || s.ForCopy != spec.ForCopy {
		return pool.Errorf(pool.ErrExists, "snapshot %s exists, of volume %s", s.ID, s.SourceID)
	}
	return nil
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
	e.dropSnapshot(name)
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
	return at, e.mustBeAsBefore(from)
}

// mustBeAsBefore refuses what was taken of a volume whose bytes are known to be
// something else by now.
func (e *Engine) mustBeAsBefore(from *origin) error {
	v, err := e.Volume(from.volume)
	if err == nil && v.Content != from.content {
		err = pool.Errorf(pool.ErrBusy, "volume %s was put to its first use just now; repeat the call", from.volume)
	}
	return err
}

func (e *Engine) read(ctx context.Context, dst *os.File, from *origin) (at time.Time, err error) {
	src, writable, err := e.openOrigin(from)
	if err != nil {
		return time.Time{}, err
	}
	defer src.Close()
	if !e.info.Reflink {
		at = time.Now()
		return at, extent.Copy(ctx, dst, src)
	}
	if writable == nil {
		at = time.Now()
		return at, extent.Clone(dst, src)
	}
	h, err := e.hold(ctx, []subject{{from.volume, *writable}}, true)
	if err != nil {
		return time.Time{}, err
	}
	at = time.Now()
	err = extent.Clone(dst, src)
	return at, errors.Join(err, h.release())
}

// openOrigin opens the image of a source, and finds the device through which it
// may be written as we read it, or nil. There must be none if the pool cannot
// share blocks.
func (e *Engine) openOrigin(from *origin) (src *os.File, writable *loop.Device, err error) {
	src, err = e.open(path.Join(from.dir, dataFile), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, pool.Errorf(pool.ErrDamaged, "the source's image is missing: %w", err)
	}
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			src.Close()
		}
	}()
	if info, err := src.Stat(); err != nil || info.Size() < from.size {
		return nil, nil, errors.Join(err, pool.Errorf(pool.ErrDamaged, "the source's image is shorter than its %d bytes", from.size))
	}
	if writable, err = e.writableDevice(src, from); err != nil {
		return nil, nil, err
	}
	if writable != nil && !e.info.Reflink {
		return nil, nil, pool.Errorf(pool.ErrPrecondition, "volume %s is attached, and pool %s is on a filesystem that cannot share blocks (reflink): stop the workload that uses the volume and repeat, or keep such volumes in a pool on XFS or btrfs (source: file or device makes one)", from.volume, e.info.Name)
	}
	return src, writable, nil
}

// writableDevice finds the device through which the source may be written as we
// read it, or nil.
func (e *Engine) writableDevice(src *os.File, from *origin) (*loop.Device, error) {
	if from.volume == "" {
		return nil, nil
	}
	devices, err := e.loopsOf(from.volume, src)
	if err != nil || len(devices) == 0 || devices[0].ReadOnly {
		return nil, err
	}
	return &devices[0], nil
}
