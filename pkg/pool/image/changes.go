package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Allocated implements [pool.Engine]: it is how the snapshot differs from
// nothing.
func (e *Engine) Allocated(ctx context.Context, name string, from int64) iter.Seq2[pool.Range, error] {
	return func(yield func(pool.Range, error) bool) {
		s, data, err := e.openSnapshot(name)
		if err != nil {
			yield(pool.Range{}, err)
			return
		}
		defer data.Close()
		give(yield, name, extent.Changed(extent.None, extent.Map(ctx, data, from, s.Size), from, s.Size))
	}
}

// Changed implements [pool.Engine]. Two snapshots that are reflinks of one image
// have a block in the same place exactly as long as nothing was written there:
// a place that a snapshot holds is not given to anything else, and what is
// shared is never written to.
func (e *Engine) Changed(ctx context.Context, base, target string, from int64) iter.Seq2[pool.Range, error] {
	return func(yield func(pool.Range, error) bool) {
		if !e.info.Reflink {
			yield(pool.Range{}, pool.Errorf(pool.ErrPrecondition, "pool %s is on a filesystem that cannot share blocks (reflink), so it cannot tell what changed between two snapshots: copy what is allocated in %s, or keep such volumes in a pool on XFS or btrfs (source: file or device makes one)", e.info.Name, target))
			return
		}
		t, targetData, err := e.openSnapshot(target)
		if err != nil {
			yield(pool.Range{}, err)
			return
		}
		defer targetData.Close()
		b, baseData, err := e.openSnapshot(base)
		if err != nil {
			yield(pool.Range{}, err)
			return
		}
		defer baseData.Close()
		if b.SourceID != t.SourceID {
			yield(pool.Range{}, pool.Errorf(pool.ErrPrecondition, "snapshot %s is of volume %s and snapshot %s of volume %s: only of one volume can be told what changed", b.ID, b.SourceID, t.ID, t.SourceID))
			return
		}
		if base == target {
			return // also where the filesystem tells no places
		}
		give(yield, target, extent.Changed(
			extent.Map(ctx, baseData, from, min(b.Size, t.Size)),
			extent.Map(ctx, targetData, from, t.Size), from, t.Size))
	}
}

// give passes the ranges of a snapshot on.
func give(yield func(pool.Range, error) bool, name string, ranges iter.Seq2[extent.Range, error]) {
	for r, err := range ranges {
		if errors.Is(err, extent.ErrUnsupported) {
			err = pool.Errorf(pool.ErrPrecondition, "the filesystem of the pool does not tell where the blocks of a file are: copy all of snapshot %s instead: %w", name, err)
		}
		if err != nil {
			err = fmt.Errorf("finding the blocks of snapshot %s: %w", name, err)
		}
		if !yield(pool.Range(r), err) || err != nil {
			return
		}
	}
}

// openSnapshot opens a snapshot's image and checks that it is all there.
func (e *Engine) openSnapshot(name string) (pool.Snapshot, *os.File, error) {
	s, err := e.Snapshot(name)
	if err != nil {
		return s, nil, err
	}
	data, err := e.open(path.Join(snapshotsDir, name, dataFile), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil, pool.Errorf(pool.ErrDamaged, "the image of snapshot %s is missing: %w", name, err)
	}
	if err != nil {
		return s, nil, err
	}
	info, err := data.Stat()
	if err == nil && info.Size() < s.Size {
		err = pool.Errorf(pool.ErrDamaged, "the image of snapshot %s has %d bytes of %d", name, info.Size(), s.Size)
	}
	if err != nil {
		data.Close()
		return s, nil, err
	}
	return s, data, nil
}
