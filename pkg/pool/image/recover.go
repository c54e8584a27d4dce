package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
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
	if err := e.load(ctx, volumesDir, volumeFile, func(one *entry) error { return e.loadVolume(one, table) }); err != nil {
		return err
	}
	if err := e.load(ctx, snapshotsDir, snapshotFile, e.loadSnapshot); err != nil {
		return err
	}
	deleted, err := namesIn(e.root, trashDir)
	for _, name := range deleted {
		e.throw(trashEntry{name: name, bytes: e.blocks(path.Join(trashDir, name, dataFile))})
	}
	return err
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
