package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// entry is a volume or a snapshot in its directory of the pool, as it is read
// from there.
type entry struct {
	name     string
	image    fs.FileInfo // nil if it cannot be asked
	metadata *os.File    // opened, and on its way from the disk
	size     int64       // of the metadata, bytes
	err      error       // why it cannot be read
}

// openEntry opens an entry of a directory of the pool, and waits for nothing
// that is in its metadata.
func openEntry(at *os.Root, name, metadata string) *entry {
	one := &entry{name: name}
	inside, err := openFolder(at, name)
	if err != nil {
		one.err = err
		return one
	}
	defer inside.Close()
	if info, err := inside.Lstat(dataFile); err == nil {
		one.image = info
	}
	if !pool.ValidName(name) {
		one.err = pool.Errorf(pool.ErrDamaged, "%q cannot be the name of a volume or snapshot", name)
		return one
	}
	if one.metadata, one.size, one.err = openSized(inside, metadata, os.O_RDONLY); one.err == nil {
		extent.ReadAhead(one.metadata, 0, one.size)
	}
	return one
}

// read decodes the metadata of an entry, and closes it.
func (one *entry) read(v any) error {
	if one.err != nil {
		return one.err
	}
	defer one.metadata.Close()
	return readOpen(one.metadata, one.size, v)
}

// A cold disk is waited for least when it is asked for much at once: loaders
// each open so many entries before they read the first.
const (
	loaders = 4
	atOnce  = 64
)

// load gives take every entry of a directory of the pool.
func (e *Engine) load(ctx context.Context, dir, metadata string, take func(*entry) error) error {
	at, err := openFolder(e.root, dir)
	if err != nil {
		return err
	}
	defer at.Close()
	names, err := namesIn(at, ".")
	if err != nil {
		return err
	}
	batches := make(chan []string, len(names)/atOnce+1)
	for batch := range slices.Chunk(names, atOnce) {
		batches <- batch
	}
	close(batches)
	failures := make([]error, loaders)
	var loading sync.WaitGroup
	for i := range loaders {
		loading.Go(func() {
			for batch := range batches {
				if failures[i] = ctx.Err(); failures[i] != nil {
					return
				}
				opened := make([]*entry, len(batch))
				for j, name := range batch {
					opened[j] = openEntry(at, name, metadata)
				}
				for _, one := range opened { // all of them, to close them
					failures[i] = errors.Join(failures[i], take(one))
				}
				if failures[i] != nil {
					return
				}
			}
		})
	}
	loading.Wait()
	return errors.Join(failures...)
}

// namesIn lists a directory, and looks at nothing of what is in it: on a cold
// disk that would take longer than all the rest.
func namesIn(root *os.Root, dir string) ([]string, error) {
	f, err := root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// loadVolume reads one volume into the catalog. One that cannot be trusted is
// kept apart; what its file takes stays promised.
func (e *Engine) loadVolume(one *entry, table bound) error {
	v, err := readVolume(one)
	e.seen.remember(one.name, table.of(path.Join(e.resolved, volumesDir, one.name, dataFile), one.image)...)
	if err != nil {
		e.keepApart(&e.damagedVolumes, one, err)
		return nil
	}
	if one.image != nil && one.image.Mode().IsRegular() && one.image.Size() > v.Size && one.image.Size()%pool.SizeUnit == 0 {
		v.Size = one.image.Size() // a growth that a crash cut off
		// On a full disk the image alone goes on telling, to the next start.
		if err := e.rewrite(v); err != nil && !errors.Is(err, pool.ErrNoSpace) {
			return fmt.Errorf("completing the growth of volume %s: %w", v.Name, err)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterVolume(v)
	e.ledger.add(v.Size, v.Provisioning)
	return nil
}

// readVolume reads a volume's metadata and checks what everything else relies
// on.
func readVolume(one *entry) (pool.Volume, error) {
	var v pool.Volume
	if err := one.read(&v); err != nil {
		return pool.Volume{}, err
	}
	switch {
	case v.Name != one.name:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "its metadata is that of volume %q", v.Name)
	case v.Size <= 0 || v.Size%pool.SizeUnit != 0:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "size %d is not a positive multiple of %d", v.Size, pool.SizeUnit)
	case v.Provisioning != pool.Thin && v.Provisioning != pool.Thick:
		return pool.Volume{}, pool.Errorf(pool.ErrDamaged, "provisioning %q is neither thin nor thick", v.Provisioning)
	}
	return v, nil
}

// readable looks whether a volume could be read if the driver started now.
func (e *Engine) readable(name string) error {
	at, err := openFolder(e.root, volumesDir)
	if err != nil {
		return err
	}
	defer at.Close()
	_, err = readVolume(openEntry(at, name, volumeFile))
	return err
}

// loadSnapshot reads one snapshot into the catalog, like loadVolume.
func (e *Engine) loadSnapshot(one *entry) error {
	s, err := readSnapshot(one)
	if err != nil {
		e.keepApart(&e.damagedSnapshots, one, err)
		return nil
	}
	charge := blocksOf(one.image)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterSnapshot(snapshot{Snapshot: s, charge: charge})
	e.ledger.add(charge, pool.Thin)
	return nil
}

func readSnapshot(one *entry) (pool.Snapshot, error) {
	var s pool.Snapshot
	if err := one.read(&s); err != nil {
		return pool.Snapshot{}, err
	}
	switch {
	case s.Name != one.name || s.Size <= 0:
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "its metadata is that of snapshot %q of %d bytes", s.Name, s.Size)
	case one.image == nil:
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "its image is missing")
	case !one.image.Mode().IsRegular() || one.image.Size() < s.Size:
		return pool.Snapshot{}, pool.Errorf(pool.ErrDamaged, "its image has %d bytes of %d", one.image.Size(), s.Size)
	}
	return s, nil
}

// keepApart remembers something damaged. A volume may grow to its full size, so
// that is promised if its image can tell it.
func (e *Engine) keepApart(where *catalog[damage], one *entry, err error) {
	var charge int64
	if one.image != nil && one.image.Mode().IsRegular() {
		charge = one.image.Size()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	where.put(one.name, damage{err: err, charge: charge})
	e.ledger.add(charge, pool.Thin)
}
