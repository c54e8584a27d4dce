package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// groupMark is the beginning of the name of a file in .staging that lists the
// snapshots of a group that are being placed. While it is there, they are not
// made: a start of the driver that finds it removes them.
const groupMark = "group-"

// cutting is snapshots of volumes of this pool that are cut at one instant. It
// implements [pool.Cutting].
type cutting struct {
	engine    *Engine
	group     *pool.Group // nil: one snapshot alone
	cuts      []*cut
	hold      *hold
	marked    bool // groupMark may be on the disk
	confirmed bool
}

// cut is one snapshot on its way.
type cut struct {
	snapshot

	from     *origin
	source   *os.File
	writable *loop.Device // through which the source may be written, or nil
	staged   *staged
	promised bool
}

var _ pool.Cutting = (*cutting)(nil)

// PrepareSnapshots implements [pool.Engine].
//
// What a snapshot may come to hold alone is what its volume has in blocks at
// the cut: all of it, once the volume is overwritten. That much is promised.
func (e *Engine) PrepareSnapshots(ctx context.Context, specs []pool.SnapshotSpec) (_ pool.Cutting, err error) {
	c := &cutting{engine: e, group: specs[0].Group}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	for _, spec := range specs { // room for all, before anything is made for one
		if err := c.promise(ctx, spec); err != nil {
			return nil, err
		}
	}
	for _, one := range c.cuts {
		if err := one.prepare(ctx, e); err != nil {
			return nil, fmt.Errorf("creating snapshot %s of volume %s: %w", one.Name, one.SourceID, err)
		}
	}
	return c, nil
}

// promise describes a snapshot and takes the room that it needs.
func (c *cutting) promise(ctx context.Context, spec pool.SnapshotSpec) error {
	e, name := c.engine, pool.NameFor(spec.RequestName)
	existing, err := e.Snapshot(name)
	if err == nil {
		return pool.Errorf(pool.ErrExists, "snapshot %s exists, of volume %s", existing.ID, existing.SourceID)
	}
	if !errors.Is(err, pool.ErrNotFound) {
		return err
	}
	v, err := e.Volume(spec.Volume)
	if err != nil {
		return err
	}
	one := &cut{
		snapshot: snapshot{
			Snapshot: pool.Snapshot{
				ID:          pool.ID{Node: e.segment, Pool: e.info.ID, Name: name}.String(),
				Name:        name,
				RequestName: spec.RequestName,
				SourceID:    v.ID,
				Size:        v.Size,
				Access:      v.Access,
				Filesystem:  v.Filesystem,
				Content:     v.Content,
				Group:       spec.Group,
				ForCopy:     spec.ForCopy,
			},
			charge: e.blocks(path.Join(volumesDir, v.Name, dataFile)),
		},
		from: &origin{path.Join(volumesDir, v.Name), v.Name, v.Size, v.Content},
	}
	c.cuts = append(c.cuts, one)
	if err := e.promise(ctx, one.charge, pool.Thin, "snapshot "+name); err != nil {
		return err
	}
	one.promised = true
	return nil
}

// prepare opens the source and makes an empty image for its bytes. Where blocks
// cannot be shared it copies them already: nobody can write to the volume.
func (one *cut) prepare(ctx context.Context, e *Engine) (err error) {
	if one.source, one.writable, err = e.openOrigin(one.from); err != nil {
		return err
	}
	if one.staged, err = e.stage(path.Join(snapshotsDir, one.Name)); err != nil {
		return err
	}
	if e.info.Reflink {
		return nil
	}
	one.Created = time.Now().UTC()
	return noSpace(extent.Copy(ctx, one.staged.data, one.source))
}

// Hold implements [pool.Cutting].
func (c *cutting) Hold(ctx context.Context) (err error) {
	var subjects []subject
	for _, one := range c.cuts {
		if one.writable != nil {
			subjects = append(subjects, subject{one.from.volume, *one.writable})
		}
	}
	if len(subjects) == 0 {
		return nil
	}
	c.hold, err = c.engine.hold(ctx, subjects, c.group == nil || len(c.group.Volumes) == 1)
	return err
}

// Cut implements [pool.Cutting]. The blocks are shared, which takes long where
// an image is in many pieces, so that it is done for all at once.
func (c *cutting) Cut(ctx context.Context) error {
	if !c.engine.info.Reflink {
		return nil
	}
	at := time.Now().UTC()
	return each(c.cuts, func(one *cut) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		one.Created = at
		return noSpace(extent.Clone(one.staged.data, one.source))
	})
}

// Check implements [pool.Cutting]. A snapshot that is cut alone is good even if
// the hold did not last: to share blocks is atomic.
func (c *cutting) Check(context.Context) error {
	if c.hold == nil || c.group == nil || len(c.group.Volumes) == 1 {
		return nil
	}
	return c.hold.check()
}

// Release implements [pool.Cutting].
func (c *cutting) Release(context.Context) error {
	if c.hold == nil {
		return nil
	}
	return c.hold.release()
}

// Place implements [pool.Cutting].
func (c *cutting) Place(context.Context) ([]pool.Snapshot, error) {
	var made []pool.Snapshot
	for _, one := range c.cuts {
		// See take.
		if err := c.engine.mustBeAsBefore(one.from); err != nil {
			return nil, err
		}
		if err := one.staged.complete(snapshotFile, one.Snapshot); err != nil {
			return nil, err
		}
		made = append(made, one.Snapshot)
	}
	if err := c.mark(); err != nil {
		return nil, err
	}
	for _, one := range c.cuts {
		if err := one.staged.place(); err != nil {
			return nil, err
		}
	}
	return made, nil
}

// markName is the name of the group's mark. A group is cut once at a time.
func (c *cutting) markName() string {
	return path.Join(stagingDir, groupMark+pool.NameFor(c.group.Name))
}

// mark notes on stable storage what a crash has to take away again.
func (c *cutting) mark() error {
	if c.group == nil {
		return nil
	}
	var names []string
	for _, one := range c.cuts {
		names = append(names, one.Name)
	}
	c.marked = true
	if err := writeMetadata(c.engine.root, c.markName(), names); err != nil {
		return noSpace(err)
	}
	return noSpace(syncDir(c.engine.root, stagingDir))
}

// unmark removes the mark, so that it does not come back.
func (c *cutting) unmark() error {
	if !c.marked {
		return nil
	}
	if err := c.engine.root.Remove(c.markName()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(c.engine.root, stagingDir)
}

// Confirm implements [pool.Cutting].
func (c *cutting) Confirm(context.Context) error {
	if err := c.unmark(); err != nil {
		return err
	}
	c.confirmed = true
	e := c.engine
	for _, one := range c.cuts {
		// The volume may have been written since it was measured.
		charge := e.blocks(path.Join(snapshotsDir, one.Name, dataFile))
		e.ledger.add(charge-one.charge, pool.Thin)
		one.charge = charge
		e.mu.Lock()
		e.enterSnapshot(one.snapshot)
		e.mu.Unlock()
	}
	return nil
}

// Close implements [pool.Cutting].
func (c *cutting) Close() error {
	var errs []error
	if c.hold != nil {
		errs = append(errs, c.hold.release())
	}
	for _, one := range c.cuts {
		errs = append(errs, one.close(c.engine, c.confirmed))
	}
	if !c.confirmed && errors.Join(errs...) == nil {
		errs = append(errs, c.unmark()) // it stays where something does
	}
	return errors.Join(errs...)
}

func (one *cut) close(e *Engine, confirmed bool) (err error) {
	if one.staged != nil {
		if !confirmed {
			err = one.staged.undo()
		}
		one.staged.data.Close()
	}
	if one.source != nil {
		one.source.Close()
	}
	if one.promised && !confirmed {
		e.ledger.give(one.charge, pool.Thin)
	}
	return err
}

// rollBack removes, at the start of the driver, the snapshots of groups that
// were being placed. It comes before they are loaded.
func (e *Engine) rollBack(staging []fs.DirEntry) error {
	for _, entry := range staging {
		if !strings.HasPrefix(entry.Name(), groupMark) {
			continue
		}
		var names []string
		err := readMetadata(e.root, path.Join(stagingDir, entry.Name()), &names)
		if errors.Is(err, pool.ErrDamaged) {
			continue // the crash came before it was whole, and so before what it lists
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if !pool.ValidName(name) {
				return pool.Errorf(pool.ErrDamaged, "%s lists %.64q, which cannot be a snapshot", entry.Name(), name)
			}
			if err := e.takeBack(path.Join(snapshotsDir, name)); err != nil {
				return fmt.Errorf("removing snapshot %s of a group that a crash cut off: %w", name, err)
			}
		}
	}
	return nil
}
