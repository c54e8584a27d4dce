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

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Volume implements [pool.Engine].
func (e *Engine) Volume(name string) (pool.Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if v, ok := e.volumes.get(name); ok {
		return v, nil
	}
	if d, ok := e.damagedVolumes.get(name); ok {
		return pool.Volume{}, e.damaged(volumesDir, name, d)
	}
	return pool.Volume{}, pool.Errorf(pool.ErrNotFound, "volume %s does not exist in pool %s", name, e.info.Name)
}

// damaged is the error of everything that is asked of something damaged.
func (e *Engine) damaged(dir, name string, d damage) error {
	return pool.Errorf(pool.ErrDamaged, "%s is damaged and was left alone (%w); mend or remove it by hand and restart the driver", path.Join(e.dir, dir, name), d.err)
}

// Volumes implements [pool.Engine].
func (e *Engine) Volumes(after string, max int) []pool.Volume {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.volumes.list(after, max)
}

// CreateVolume implements [pool.Engine].
func (e *Engine) CreateVolume(ctx context.Context, spec pool.VolumeSpec) (pool.Volume, error) {
	name := pool.NameFor(spec.RequestName)
	existing, err := e.Volume(name)
	switch {
	case err == nil:
		return existing, mustMatch(existing, spec)
	case !errors.Is(err, pool.ErrNotFound):
		return pool.Volume{}, err
	}
	v := pool.Volume{
		ID:           spec.ID,
		Name:         name,
		RequestName:  spec.RequestName,
		Size:         spec.Size,
		Provisioning: spec.Provisioning,
		Access:       spec.Access,
		Filesystem:   spec.Filesystem,
		MkfsOptions:  spec.MkfsOptions,
		Ephemeral:    spec.Ephemeral,
		Source:       spec.Source,
		Limits:       spec.Limits,
		Content:      pool.ContentEmpty,
		Created:      time.Now().UTC(),
	}
	if v.ID == "" {
		v.ID = pool.ID{Node: e.segment, Pool: e.info.ID, Name: name}.String()
	}
	from, err := e.originOf(spec)
	if err != nil {
		return pool.Volume{}, err
	}
	if from != nil {
		if v.Size < from.size {
			return pool.Volume{}, pool.Errorf(pool.ErrOutOfRange, "%d bytes are too few: the source has %d", v.Size, from.size)
		}
		v.Content = from.content
		if from.content == pool.ContentFilesystem || from.content == pool.ContentRaw {
			v.Content = pool.ContentCopied
		}
	}
	if spec.Remote != nil {
		if err := e.copyVolume(ctx, v, spec.Remote); err != nil {
			return pool.Volume{}, fmt.Errorf("copying volume %s: %w", name, err)
		}
		return e.Volume(name)
	}
	if err := e.promise(ctx, v.Size, v.Provisioning, "volume "+name); err != nil {
		return pool.Volume{}, err
	}
	if err := e.makeVolume(ctx, &v, from); err != nil {
		e.ledger.give(v.Size, v.Provisioning)
		return pool.Volume{}, fmt.Errorf("creating volume %s: %w", name, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterVolume(v)
	return v, nil
}

// mustMatch compares a volume with the request that finds it under its name.
func mustMatch(v pool.Volume, spec pool.VolumeSpec) error {
	var differs []string
	for what, same := range map[string]bool{
		"name":         v.RequestName == spec.RequestName,
		"size":         v.Size >= spec.Size && (spec.MaxSize == 0 || v.Size <= spec.MaxSize),
		"provisioning": v.Provisioning == spec.Provisioning,
		"access type":  v.Access == spec.Access,
		"filesystem":   v.Filesystem == spec.Filesystem,
		"mkfsOptions":  v.MkfsOptions == spec.MkfsOptions,
		"source":       v.Source == spec.Source,
		"limits":       v.Limits == spec.Limits,
		"lifecycle":    v.Ephemeral == spec.Ephemeral,
	} {
		if !same {
			differs = append(differs, what)
		}
	}
	if len(differs) > 0 {
		return pool.Errorf(pool.ErrExists, "volume %s exists with another %s", v.ID, strings.Join(differs, ", "))
	}
	return nil
}

// origin is where the bytes of a new volume or snapshot come from.
type origin struct {
	dir     string // of the pool
	volume  string // the volume's name; empty for a snapshot, which never changes
	size    int64
	content pool.Content
}

// originOf is where the bytes of a new volume come from; nil is nowhere.
func (e *Engine) originOf(spec pool.VolumeSpec) (*origin, error) {
	if spec.Remote != nil {
		return &origin{size: spec.Remote.Size, content: spec.Remote.Content}, nil
	}
	return e.origin(spec.Source)
}

// origin finds the source in this pool; nil is no source.
func (e *Engine) origin(source pool.Source) (*origin, error) {
	id := source.SnapshotID + source.VolumeID
	if id == "" {
		return nil, nil
	}
	parsed, err := pool.ParseID(id)
	if err != nil {
		return nil, err
	}
	if source.SnapshotID != "" {
		s, err := e.Snapshot(parsed.Name)
		if err != nil {
			return nil, err
		}
		return &origin{path.Join(snapshotsDir, s.Name), "", s.Size, s.Content}, nil
	}
	v, err := e.Volume(parsed.Name)
	if err != nil {
		return nil, err
	}
	return &origin{path.Join(volumesDir, v.Name), v.Name, v.Size, v.Content}, nil
}

// makeVolume makes the volume's files in .staging and renames them into place.
// What a failure leaves is removed.
func (e *Engine) makeVolume(ctx context.Context, v *pool.Volume, from *origin) (err error) {
	return e.make(path.Join(volumesDir, v.Name), volumeFile, func(data *os.File) (any, error) {
		if from != nil {
			if _, err := e.take(ctx, data, from); err != nil {
				return nil, err
			}
		}
		if err := data.Truncate(v.Size); err != nil {
			return nil, err
		}
		if v.Provisioning == pool.Thick {
			if err := e.thicken(ctx, data, v.Size, from != nil); err != nil {
				return nil, err
			}
		}
		return *v, nil
	})
}

// thicken gives a file of that size all its blocks, alone.
func (e *Engine) thicken(ctx context.Context, data *os.File, size int64, copied bool) error {
	if err := extent.Allocate(ctx, data, 0, size); err != nil {
		return fmt.Errorf("allocating its blocks: %w", err)
	}
	if !e.info.Reflink || !copied {
		return nil
	}
	err := extent.Unshare(ctx, data)
	if errors.Is(err, extent.ErrUnsupported) {
		return pool.Errorf(pool.ErrPrecondition, "the filesystem of pool %s cannot give a copy blocks of its own: use thin provisioning for copies there (%w)", e.info.Name, err)
	}
	return err
}

// noSpace gives ENOSPC its kind.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return pool.Errorf(pool.ErrNoSpace, "%w", err)
	}
	return err
}

// make makes a directory of the pool with an image, which fill fills, and the
// metadata that fill returns: in .staging first, all of it brought to stable
// storage, then renamed to dir. If it fails, nothing is left.
func (e *Engine) make(dir, metadata string, fill func(data *os.File) (any, error)) (err error) {
	s, err := e.stage(dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.undo())
		}
		s.data.Close()
	}()
	record, err := fill(s.data)
	if err != nil {
		return noSpace(err)
	}
	if err := s.complete(metadata, record); err != nil {
		return err
	}
	return s.place()
}

// staged is a directory of the pool that is being made.
type staged struct {
	engine *Engine
	dir    string // where it belongs
	at     string // where it is made
	placed bool
	data   *os.File // the image
}

// stage begins to make a directory of the pool, with an empty image.
func (e *Engine) stage(dir string) (*staged, error) {
	return e.stageAt(dir, path.Join(stagingDir, path.Dir(dir)+"-"+path.Base(dir)))
}

// stageAt begins to make a directory of the pool at that place in .staging.
func (e *Engine) stageAt(dir, at string) (_ *staged, err error) {
	s := &staged{engine: e, dir: dir, at: at}
	err = e.root.Mkdir(s.at, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if err := e.remove(s.at); err != nil {
			return nil, fmt.Errorf("removing what an earlier try left: %w", err)
		}
		err = e.root.Mkdir(s.at, 0o700)
	}
	if err != nil {
		return nil, noSpace(err)
	}
	if s.data, err = e.root.OpenFile(path.Join(s.at, dataFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, errors.Join(noSpace(err), s.undo())
	}
	if err := extent.Prepare(s.data, extentHint); err != nil {
		s.data.Close()
		return nil, errors.Join(noSpace(err), s.undo())
	}
	return s, nil
}

// complete brings the image and its metadata to stable storage.
func (s *staged) complete(metadata string, record any) error {
	if err := writeMetadata(s.engine.root, path.Join(s.at, metadata), record); err != nil {
		return noSpace(err)
	}
	if err := s.data.Sync(); err != nil {
		return noSpace(err)
	}
	return noSpace(syncDir(s.engine.root, s.at))
}

// place gives what is complete its place in the pool.
func (s *staged) place() error {
	if err := s.engine.root.Rename(s.at, s.dir); err != nil {
		return noSpace(err)
	}
	s.placed = true
	return noSpace(s.engine.syncs[path.Dir(s.dir)].do())
}

// undo removes all of it again.
func (s *staged) undo() error {
	var err error
	if s.placed {
		err = s.engine.root.Rename(s.dir, s.at)
	}
	return errors.Join(err, s.engine.remove(s.at))
}

// open opens an image of the pool.
func (e *Engine) open(name string, flag int) (*os.File, error) {
	return openRegular(e.root, name, flag)
}

// openVolume opens a volume's image and checks that it is all there.
func (e *Engine) openVolume(v pool.Volume, flag int) (*os.File, error) {
	f, err := e.open(path.Join(volumesDir, v.Name, dataFile), flag)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, pool.Errorf(pool.ErrDamaged, "the image of volume %s is missing: %w", v.Name, err)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if info.Size() < v.Size {
		f.Close()
		return nil, pool.Errorf(pool.ErrDamaged, "the image of volume %s has %d bytes of %d", v.Name, info.Size(), v.Size)
	}
	return f, nil
}

// DeleteVolume implements [pool.Engine].
func (e *Engine) DeleteVolume(_ context.Context, name string) error {
	v, err := e.Volume(name)
	if errors.Is(err, pool.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := e.mustBeIdle(name); err != nil {
		return err
	}
	if err := e.discard(path.Join(volumesDir, name)); err != nil {
		return fmt.Errorf("deleting volume %s: %w", name, err)
	}
	e.mu.Lock()
	e.dropVolume(name)
	e.mu.Unlock()
	e.seen.remember(name)
	e.ledger.give(v.Size, v.Provisioning)
	return nil
}

// GrowVolume implements [pool.Engine].
//
// The image grows before the metadata does: an image longer than its metadata
// says is a growth that a crash cut off, and recovery completes it. The other
// way round it would look like lost data.
func (e *Engine) GrowVolume(ctx context.Context, name string, size int64) (pool.Volume, error) {
	v, err := e.Volume(name)
	if err != nil {
		return pool.Volume{}, err
	}
	if v.Size >= size {
		return v, nil
	}
	more := size - v.Size
	if err := e.promise(ctx, more, v.Provisioning, "the growth of volume "+name); err != nil {
		return pool.Volume{}, err
	}
	grown := v
	grown.Size = size
	if err := e.growImage(ctx, v, grown); err != nil {
		e.ledger.give(more, v.Provisioning)
		return pool.Volume{}, fmt.Errorf("growing volume %s: %w", name, err)
	}
	if err := e.rewrite(grown); err != nil {
		// From here on there is no way back: the new metadata may have got
		// to the disk, and an image shorter than it says is lost data. The
		// image tells the size as well, and a start heeds it.
		e.mu.Lock()
		defer e.mu.Unlock()
		e.enterVolume(grown)
		return pool.Volume{}, fmt.Errorf("recording the growth of volume %s: %w", name, err)
	}
	return grown, nil
}

// growImage makes a volume's image longer, on stable storage, or leaves it as it
// was.
func (e *Engine) growImage(ctx context.Context, v, grown pool.Volume) (err error) {
	data, err := e.openVolume(v, os.O_RDWR)
	if err != nil {
		return err
	}
	defer data.Close()
	defer func() {
		if err != nil {
			// Nobody has seen the new end: no device has it before the
			// metadata says so.
			err = errors.Join(err, data.Truncate(v.Size))
		}
	}()
	if v.Provisioning == pool.Thick {
		if err := extent.Allocate(ctx, data, v.Size, grown.Size-v.Size); err != nil {
			return noSpace(fmt.Errorf("allocating its blocks: %w", err))
		}
	}
	if err := data.Truncate(grown.Size); err != nil {
		return noSpace(err)
	}
	return data.Sync()
}

// rewrite replaces a volume's metadata on disk and then in memory.
func (e *Engine) rewrite(v pool.Volume) error {
	if err := replaceMetadata(e.root, path.Join(volumesDir, v.Name, volumeFile), path.Join(stagingDir, "metadata-"+v.Name), v); err != nil {
		return noSpace(err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enterVolume(v)
	return nil
}

// SetContent implements [pool.Engine].
func (e *Engine) SetContent(_ context.Context, name string, content pool.Content) error {
	v, err := e.Volume(name)
	if err != nil || v.Content == content {
		return err
	}
	v.Content = content
	if err := e.rewrite(v); err != nil {
		return fmt.Errorf("recording the content of volume %s: %w", name, err)
	}
	return nil
}

// SetLimits implements [pool.Engine].
func (e *Engine) SetLimits(_ context.Context, name string, limits pool.Limits) (pool.Volume, error) {
	v, err := e.Volume(name)
	if err != nil || v.Limits == limits {
		return v, err
	}
	v.Limits = limits
	if err := e.rewrite(v); err != nil {
		return pool.Volume{}, fmt.Errorf("recording the limits of volume %s: %w", name, err)
	}
	return v, nil
}

// Blank implements [pool.Engine].
func (e *Engine) Blank(name string) (bool, error) {
	v, err := e.Volume(name)
	if err != nil {
		return false, err
	}
	data, err := e.openVolume(v, os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer data.Close()
	// What was written through a device may be in its page cache alone.
	devices, err := e.loopsOf(name, data)
	if err != nil {
		return false, err
	}
	for _, d := range devices {
		if err := d.Flush(); err != nil {
			return false, err
		}
	}
	return extent.Blank(data)
}

// Zero implements [pool.Engine].
func (e *Engine) Zero(ctx context.Context, name string) error {
	v, err := e.Volume(name)
	if err != nil {
		return err
	}
	if err := e.mustBeIdle(name); err != nil {
		return err
	}
	data, err := e.openVolume(v, os.O_RDWR)
	if err != nil {
		return err
	}
	defer data.Close()
	if err := extent.Zero(ctx, data, v.Provisioning == pool.Thick); err != nil {
		return fmt.Errorf("zeroing volume %s: %w", name, err)
	}
	e.mu.Lock()
	e.worked(path.Join(volumesDir, name))
	e.mu.Unlock()
	return data.Sync()
}
