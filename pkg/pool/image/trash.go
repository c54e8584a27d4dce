package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"sync"
	"syscall"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// trash frees in the background what was deleted: to unlink a large fragmented
// file takes long, and nobody should wait for it.
type trash struct {
	mu     sync.Mutex
	queue  []trashEntry
	wake   chan struct{} // holds one token when the queue may have grown
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// trashEntry is a directory in .trash and the bytes that its files take, which
// stay promised until they are freed.
type trashEntry struct {
	name  string
	bytes int64
}

// start runs free on every entry, one after the other.
func (t *trash) start(free func(trashEntry)) {
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel = cancel
	t.done.Go(func() {
		for ctx.Err() == nil {
			entry, ok := t.take()
			if !ok {
				select {
				case <-ctx.Done():
				case <-t.wake:
				}
				continue
			}
			free(entry)
		}
	})
}

// stop ends the worker after the entry that it is at; the next start of the
// driver finds the rest.
func (t *trash) stop() {
	t.cancel()
	t.done.Wait()
}

func (t *trash) add(entry trashEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queue = append(t.queue, entry)
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *trash) take() (entry trashEntry, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == 0 {
		return trashEntry{}, false
	}
	entry, t.queue = t.queue[0], t.queue[1:]
	return entry, true
}

// discard moves a directory of the pool into the trash, which is what deletes
// it, and leaves the rest to the worker. One that is gone already, as after a
// try that could not be synced, is synced now.
func (e *Engine) discard(dir string) error {
	entry := trashEntry{
		name:  path.Base(dir) + "." + strings.ToLower(rand.Text()[:8]),
		bytes: e.blocks(path.Join(dir, dataFile)),
	}
	moveErr := e.root.Rename(dir, path.Join(trashDir, entry.name))
	if moveErr != nil && !errors.Is(moveErr, fs.ErrNotExist) {
		return moveErr
	}
	syncErr := e.syncs[path.Dir(dir)].do()
	if moveErr == nil {
		e.throw(entry)
	}
	return syncErr
}

// takeBack moves a directory of the pool into the trash, at a start of the driver
// that is yet to look there. One that is not there never was, or is gone.
func (e *Engine) takeBack(dir string) error {
	name := path.Base(dir) + "." + strings.ToLower(rand.Text()[:8])
	if err := e.root.Rename(dir, path.Join(trashDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(e.root, path.Dir(dir))
}

// throw hands an entry of .trash to the worker. Its space stays promised until
// it is free again.
func (e *Engine) throw(entry trashEntry) {
	e.ledger.addFreeing(entry.bytes)
	e.trash.add(entry)
}

// free removes an entry of .trash for good.
func (e *Engine) free(entry trashEntry) {
	dir := path.Join(trashDir, entry.name)
	if err := e.remove(dir); err != nil {
		e.note(dir, "could not be freed: "+err.Error())
	}
	e.ledger.giveFreed(entry.bytes)
}

// remove unlinks a directory of .staging or .trash: the files that are expected
// in it, once its image is proven idle, and then the directory itself, empty.
// Anything else in it makes it stay.
func (e *Engine) remove(dir string) error {
	data := path.Join(dir, dataFile)
	f, err := e.open(data, syscall.O_RDONLY)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		var devices []loop.Device
		if !loop.Unused(f) {
			devices, err = loop.Find(f)
		}
		f.Close()
		if err != nil {
			return err
		}
		if len(devices) > 0 {
			return pool.Errorf(pool.ErrInUse, "%s is attached to %s", data, devices[0].Path)
		}
	}
	for _, file := range []string{dataFile, volumeFile, snapshotFile, copyFile} {
		if err := e.root.Remove(path.Join(dir, file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := e.root.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("not empty as it should be: %w", err)
	}
	return nil
}
