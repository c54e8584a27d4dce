package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"strings"
	"time"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// A volume that is made of a snapshot elsewhere is not made in one go. What has
// arrived of it lies in .staging/copy-<name>, with a record of how far it is on
// stable storage, so that neither a broken connection nor a restart begins anew.
// Its room stays promised until it is a volume, or dropped.
const copyPrefix = "copy-"

// How often the record is brought up to date: after so many bytes, or so long.
const (
	copyStepBytes = 256 << 20
	copyStepTime  = 2 * time.Second
)

// copyRecord is the content of copy.json.
type copyRecord struct {
	Volume pool.Volume `json:"volume"` // as it will be
	Cut    int64       `json:"cut"`    // when the snapshot was cut, nanoseconds since 1970 UTC
	Done   int64       `json:"done"`   // up to this offset it is on stable storage, bytes
}

// same reports whether what arrived is good for a volume that is wanted now. A
// volume's clone is copied from a snapshot that may have been cut anew meanwhile:
// bytes of two instants must not come together.
func (r copyRecord) same(v pool.Volume, cut int64) bool {
	v.Created = r.Volume.Created
	return r.Volume == v && r.Cut == cut
}

func copyDir(name string) string { return path.Join(stagingDir, copyPrefix+name) }

// Copies implements [pool.Engine].
func (e *Engine) Copies() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string(nil), e.copies.names...)
}

// DropCopy implements [pool.Engine].
func (e *Engine) DropCopy(name string) error {
	e.mu.Lock()
	record, ok := e.copies.get(name)
	e.mu.Unlock()
	if !ok {
		return nil
	}
	if err := e.remove(copyDir(name)); err != nil {
		return fmt.Errorf("dropping what was copied for volume %s: %w", name, err)
	}
	e.mu.Lock()
	e.copies.remove(name)
	e.mu.Unlock()
	e.ledger.give(record.Volume.Size, record.Volume.Provisioning)
	return nil
}

// loadCopy takes up what a copy that did not end has brought. One whose record
// cannot be read is begun anew.
func (e *Engine) loadCopy(name string) error {
	var record copyRecord
	err := readMetadata(e.root, path.Join(copyDir(name), copyFile), &record)
	if err != nil || record.Volume.Name != name || record.Volume.Size <= 0 {
		return e.remove(copyDir(name))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.copies.put(name, record)
	e.ledger.add(record.Volume.Size, record.Volume.Provisioning)
	return nil
}

// copyVolume makes a volume of a snapshot elsewhere, beginning where an earlier
// try ended. If it fails, what has arrived stays for the next; without any, so
// does nothing.
func (e *Engine) copyVolume(ctx context.Context, v pool.Volume, remote *pool.Remote) error {
	e.mu.Lock()
	record, known := e.copies.get(v.Name)
	e.mu.Unlock()
	if known && !record.same(v, remote.Created) {
		if err := e.DropCopy(v.Name); err != nil {
			return err
		}
		known = false
	}
	if !known {
		record = copyRecord{Volume: v, Cut: remote.Created}
		if err := e.beginCopy(ctx, record); err != nil {
			return err
		}
	}
	data, err := e.open(path.Join(copyDir(v.Name), dataFile), os.O_RDWR)
	if err != nil {
		return err
	}
	s := &staged{engine: e, dir: path.Join(volumesDir, v.Name), at: copyDir(v.Name), data: data}
	defer data.Close()
	if err := e.receive(ctx, data, &record, remote); err != nil {
		return noSpace(err)
	}
	if err := s.complete(volumeFile, record.Volume); err != nil {
		return err
	}
	if err := s.place(); err != nil {
		if s.placed {
			err = errors.Join(err, e.root.Rename(s.dir, s.at))
		}
		return err
	}
	// The volume is made. Its record as a copy means nothing any more.
	if err := e.root.Remove(path.Join(s.dir, copyFile)); err != nil {
		e.note(path.Join(s.dir, copyFile), "is left of the copy that the volume was made by: "+err.Error())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.copies.remove(v.Name)
	e.enterVolume(record.Volume)
	return nil
}

// beginCopy promises the room of a volume that is to be copied, and makes the
// place where it arrives.
func (e *Engine) beginCopy(ctx context.Context, record copyRecord) (err error) {
	v := record.Volume
	if err := e.promise(ctx, v.Size, v.Provisioning, "volume "+v.Name); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			e.ledger.give(v.Size, v.Provisioning)
		}
	}()
	s, err := e.stageAt(path.Join(volumesDir, v.Name), copyDir(v.Name))
	if err != nil {
		return err
	}
	defer s.data.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo())
		}
	}()
	if err := s.data.Truncate(v.Size); err != nil {
		return noSpace(err)
	}
	if v.Provisioning == pool.Thick {
		if err := e.thicken(ctx, s.data, v.Size, false); err != nil {
			return noSpace(err)
		}
	}
	if err := s.complete(copyFile, record); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.copies.put(v.Name, record)
	return nil
}

// receive writes what the snapshot has to the image, and records how far it is.
func (e *Engine) receive(ctx context.Context, data *os.File, record *copyRecord, remote *pool.Remote) error {
	w, err := newWriteBehind(data)
	if err != nil {
		return err
	}
	defer w.close()
	step := func(at int64) error {
		if err := w.drain(); err != nil {
			return err
		}
		return e.step(data, record, at)
	}
	// What arrived last is behind the record; it is written again.
	last, at, since := time.Now(), record.Done, int64(0)
	for piece, err := range remote.Read(ctx, record.Done) {
		if err != nil {
			return errors.Join(err, step(at))
		}
		end := piece.Offset + int64(len(piece.Data))
		if piece.Offset < at || end > remote.Size {
			return pool.Errorf(pool.ErrDamaged, "the source gave %d bytes at %d after what ends at %d, of %d bytes", len(piece.Data), piece.Offset, at, remote.Size)
		}
		if err := w.put(piece); err != nil {
			return err
		}
		at, since = end, since+int64(len(piece.Data))
		if since >= copyStepBytes || time.Since(last) >= copyStepTime {
			if err := step(at); err != nil {
				return err
			}
			last, since = time.Now(), 0
		}
	}
	return errors.Join(ctx.Err(), w.drain())
}

// step brings what is written up to an offset to stable storage, and then the
// record of it.
func (e *Engine) step(data *os.File, record *copyRecord, at int64) error {
	if at == record.Done {
		return nil
	}
	if err := data.Sync(); err != nil {
		return err
	}
	record.Done = at
	name := record.Volume.Name
	if err := replaceMetadata(e.root, path.Join(copyDir(name), copyFile), path.Join(stagingDir, "metadata-"+name), *record); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.copies.put(name, *record)
	return nil
}

// Read implements [pool.Engine].
func (e *Engine) Read(ctx context.Context, snapshot string, from int64) iter.Seq2[pool.Piece, error] {
	return func(yield func(pool.Piece, error) bool) {
		s, data, err := e.openSnapshot(snapshot)
		if err != nil {
			yield(pool.Piece{}, err)
			return
		}
		defer data.Close()
		for piece, err := range readAhead(ctx, data, e.allocated(ctx, snapshot, data, from, s.Size)) {
			if err != nil && ctx.Err() == nil {
				err = fmt.Errorf("reading snapshot %s: %w", snapshot, err)
			}
			if !yield(piece, err) || err != nil {
				return
			}
		}
	}
}

// allocated gives what of a snapshot may be other than zeros. On a filesystem
// that does not tell, that is what has data for lseek(2).
func (e *Engine) allocated(ctx context.Context, name string, data *os.File, from, to int64) iter.Seq2[pool.Range, error] {
	return func(yield func(pool.Range, error) bool) {
		for r, err := range extent.Changed(extent.None, extent.Map(ctx, data, from, to), from, to) {
			if errors.Is(err, extent.ErrUnsupported) {
				for r, err := range extent.Data(data, from, to) {
					if !yield(pool.Range(r), err) || err != nil {
						return
					}
				}
				return
			}
			if err != nil {
				err = fmt.Errorf("finding the blocks of snapshot %s: %w", name, err)
			}
			if !yield(pool.Range(r), err) || err != nil {
				return
			}
		}
	}
}

// copyName tells whether an entry of .staging is a copy on its way, and of which
// volume.
func (e *Engine) copyName(entry string) (name string, ok bool) {
	name, ok = strings.CutPrefix(entry, copyPrefix)
	if !ok || !pool.ValidName(name) {
		return "", false
	}
	if _, err := e.root.Lstat(path.Join(stagingDir, entry, copyFile)); errors.Is(err, fs.ErrNotExist) {
		return "", false
	}
	return name, true
}
