package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"sync"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// recover brings a pool from the state that a crash may have left it in to one
// that every call can start from: what is frozen is thawed, what was being made
// is removed, what was deleted is freed, a growth that was cut off is
// completed, and the catalog is what the directory says.
func (e *Engine) recover(ctx context.Context) error {
	entries, err := fs.ReadDir(e.root.FS(), stagingDir)
	if err != nil {
		return err
	}
	for _, entry := range entries { // first of all: somebody's writes hang
		if err := e.letGo(entry.Name()); err != nil {
			return err
		}
	}
	if err := e.rollBack(entries); err != nil {
		return err
	}
	for _, entry := range entries {
		at := path.Join(stagingDir, entry.Name())
		if name, ok := e.copyName(entry.Name()); ok {
			if err := e.loadCopy(name); err != nil {
				e.note(at, "was left by a copy that did not end, and could not be removed: "+err.Error())
			}
			continue
		}
		remove := e.root.Remove
		if entry.IsDir() {
			remove = e.remove
		}
		if err := remove(at); err != nil {
			e.note(at, "was left by a call that a crash cut off, and could not be removed: "+err.Error())
		}
	}
	table, err := e.bound()
	if err != nil {
		return err
	}
	if err := e.scan(ctx, volumesDir, func(name string) error { return e.loadVolume(name, table) }); err != nil {
		return err
	}
	if err := e.scan(ctx, snapshotsDir, e.loadSnapshot); err != nil {
		return err
	}
	return e.scan(ctx, trashDir, func(name string) error {
		e.throw(trashEntry{name: name, bytes: e.blocks(path.Join(trashDir, name, dataFile))})
		return nil
	})
}

// thaw ends a freeze of ours that the process did not live to end.
func (e *Engine) thaw(volume string) error {
	data, err := e.open(path.Join(volumesDir, volume, dataFile), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer data.Close()
	devices, err := loop.Find(data)
	if err != nil {
		return err
	}
	for _, d := range devices {
		mounts, _, err := filesystem.UsesOf(d.Number)
		if err != nil {
			return err
		}
		if len(mounts) == 0 {
			continue
		}
		if _, err := filesystem.Thaw(mounts[0].Path); err != nil {
			return err
		}
	}
	return nil
}

// readers is how many entries of a directory are loaded at once: to wait for a
// cold disk is what takes the time.
const readers = 32

// scan calls load for every entry of a directory of the pool.
func (e *Engine) scan(ctx context.Context, dir string, load func(name string) error) error {
	entries, err := fs.ReadDir(e.root.FS(), dir)
	if err != nil {
		return err
	}
	names := make(chan string)
	failures := make(chan error, readers)
	var loading sync.WaitGroup
	for range readers {
		loading.Go(func() {
			for name := range names {
				if err := load(name); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	for _, entry := range entries {
		select {
		case names <- entry.Name():
			continue
		case err = <-failures:
		case <-ctx.Done():
			err = ctx.Err()
		}
		break
	}
	close(names)
	loading.Wait()
	close(failures)
	for failure := range failures {
		err = errors.Join(err, failure)
	}
	return err
}

// loadVolume reads one volume into the catalog. One that cannot be trusted is
// kept apart; what its file takes stays promised.
func (e *Engine) loadVolume(name string, table bound) error {
	image := path.Join(volumesDir, name, dataFile)
	info, statErr := e.root.Lstat(image)
	if statErr != nil {
		info = nil
	}
	e.seen.remember(name, table.of(path.Join(e.resolved, image), info)...)
	v, err := e.readVolume(name)
	if err != nil {
		e.keepApart(&e.damagedVolumes, volumesDir, name, err)
		return nil
	}
	if info != nil && info.Mode().IsRegular() && info.Size() > v.Size && info.Size()%pool.SizeUnit == 0 {
		v.Size = info.Size() // a growth that a crash cut off
		if err := e.rewrite(v); err != nil {
			return fmt.Errorf("completing the growth of volume %s: %w", name, err)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterVolume(v)
	e.ledger.add(v.Size, v.Provisioning)
	return nil
}

// readVolume reads a volume's metadata from disk and checks what everything
// else relies on.
func (e *Engine) readVolume(name string) (pool.Volume, error) {
	if !pool.ValidName(name) {
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "%q cannot be the name of a volume", name)
	}
	var v pool.Volume
	if err := readMetadata(e.root, path.Join(volumesDir, name, volumeFile), &v); err != nil {
		return pool.Volume{}, err
	}
	switch {
	case v.Name != name:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "its metadata is that of volume %q", v.Name)
	case v.Size <= 0 || v.Size%pool.SizeUnit != 0:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "size %d is not a positive multiple of %d", v.Size, pool.SizeUnit)
	case v.Provisioning != pool.Thin && v.Provisioning != pool.Thick:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "provisioning %q is neither thin nor thick", v.Provisioning)
	}
	return v, nil
}

// loadSnapshot reads one snapshot into the catalog, like loadVolume.
func (e *Engine) loadSnapshot(name string) error {
	s, err := e.readSnapshot(name)
	if err != nil {
		e.keepApart(&e.damagedSnapshots, snapshotsDir, name, err)
		return nil
	}
	charge := e.blocks(path.Join(snapshotsDir, name, dataFile))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterSnapshot(snapshot{Snapshot: s, charge: charge})
	e.ledger.add(charge, pool.Thin)
	return nil
}

func (e *Engine) readSnapshot(name string) (pool.Snapshot, error) {
	if !pool.ValidName(name) {
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "%q cannot be the name of a snapshot", name)
	}
	var s pool.Snapshot
	if err := readMetadata(e.root, path.Join(snapshotsDir, name, snapshotFile), &s); err != nil {
		return pool.Snapshot{}, err
	}
	if s.Name != name || s.Size <= 0 {
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "its metadata is that of snapshot %q of %d bytes", s.Name, s.Size)
	}
	info, err := e.root.Lstat(path.Join(snapshotsDir, name, dataFile))
	if err != nil {
		return pool.Snapshot{}, err
	}
	if !info.Mode().IsRegular() || info.Size() < s.Size {
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "its image has %d bytes of %d", info.Size(), s.Size)
	}
	return s, nil
}

// keepApart remembers something damaged. A volume may grow to its full size, so
// that is promised if its image can tell it.
func (e *Engine) keepApart(where *catalog[damage], dir, name string, err error) {
	var charge int64
	if info, statErr := e.root.Lstat(path.Join(dir, name, dataFile)); statErr == nil && info.Mode().IsRegular() {
		charge = info.Size()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	where.put(name, damage{err: err, charge: charge})
	e.ledger.add(charge, pool.Thin)
}
