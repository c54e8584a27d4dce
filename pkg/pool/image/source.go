package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/config"
	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// poolLabel is the label of every filesystem that the driver makes for a pool.
// One without it is somebody else's.
const poolLabel = "orlop"

// source is where a pool's directory comes from.
type source struct {
	dir       string
	exclusive bool         // the filesystem is the pool's alone, mounted by us
	image     *loop.Device // that it is on, for a file source
}

// Check finds out whether a pool's source is there and fit to be opened. It
// changes nothing, so that all pools can be checked before the first is
// touched. Its errors name the field of the configuration.
func Check(ctx context.Context, o Options) error {
	s := o.Pool.Source
	switch {
	case s.File != nil:
		_, err := checkFile(o, *s.File)
		return err
	case s.Device != "":
		_, err := checkDevice(ctx, o, s.Device)
		return err
	default:
		return checkDirectory(s.Directory)
	}
}

func openSource(ctx context.Context, o Options) (*source, error) {
	s := o.Pool.Source
	switch {
	case s.File != nil:
		return openFile(ctx, o, *s.File)
	case s.Device != "":
		return openDevice(ctx, o, s.Device)
	default:
		return &source{dir: s.Directory}, checkDirectory(s.Directory)
	}
}

// close undoes the mount of an exclusive source, unless something in it is
// still in use: a volume that is attached survives the driver.
func (s *source) close() error {
	if s == nil || !s.exclusive {
		return nil
	}
	err := filesystem.Unmount(context.Background(), s.dir)
	if errors.Is(err, filesystem.ErrBusy) {
		return nil
	}
	if err == nil && s.image != nil {
		if err = s.image.Detach(context.Background()); errors.Is(err, loop.ErrBusy) || errors.Is(err, loop.ErrDetached) {
			return nil
		}
	}
	return err
}

func checkDirectory(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return pool.Errorf(pool.ErrPrecondition, "source.directory: %w; make it, or mount its disk, first", err)
	}
	if !info.IsDir() {
		return pool.Errorf(pool.ErrPrecondition, "source.directory: %s is not a directory", dir)
	}
	_, err = os.Lstat(filepath.Join(dir, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		if err := mustBeUnused(os.DirFS(dir)); err != nil {
			return fmt.Errorf("source.directory: %s: %w", dir, err)
		}
		return nil
	}
	return err
}

// checkFile checks an image file and tells whether it is there already.
func checkFile(o Options, file config.FileSource) (exists bool, err error) {
	const field = "source.file.path"
	info, err := os.Lstat(file.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(file.Path)); err != nil {
			return false, pool.Errorf(pool.ErrPrecondition, "%s: %w", field, err)
		}
		return false, mustBeNew(o, field, file.Path+" is gone")
	case err != nil:
		return false, pool.Errorf(pool.ErrPrecondition, "%s: %w", field, err)
	case !info.Mode().IsRegular():
		return false, pool.Errorf(pool.ErrPrecondition, "%s: %s is not a regular file", field, file.Path)
	}
	if err := mustBeOurs(file.Path, field); err != nil {
		return false, err
	}
	if info.Size() > file.Size {
		return false, pool.Errorf(pool.ErrPrecondition, "source.file.size: %s has %d bytes, more than %d; a pool cannot shrink", file.Path, info.Size(), file.Size)
	}
	return true, nil
}

// mustBeNew refuses to begin a new pool where this node has had one. gone says
// what looks as if there had never been any.
func mustBeNew(o Options, field, gone string) error {
	known, err := knownPool(o)
	if err != nil {
		return err
	}
	if known != "" {
		return pool.Errorf(pool.ErrPrecondition, "%s: %s, but this node's pool %q was %s: is its disk mounted? If it is gone for good, remove %s to begin a new pool", field, gone, o.Pool.Name, known, recordPath(o))
	}
	return nil
}

// openFile mounts the filesystem in an image file. The file is made complete
// under another name first: one that has its name is whole.
func openFile(ctx context.Context, o Options, file config.FileSource) (_ *source, err error) {
	exists, err := checkFile(o, file)
	if err != nil {
		return nil, err
	}
	if !exists {
		if err := makeFile(ctx, file); err != nil {
			return nil, fmt.Errorf("source.file: making %s: %w", file.Path, err)
		}
	}
	f, err := os.OpenFile(file.Path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if !file.Sparse {
		if err := noSpace(extent.Allocate(ctx, f, 0, file.Size)); err != nil {
			return nil, fmt.Errorf("source.file.size: allocating %s: %w (sparse: true would not allocate it)", file.Path, err)
		}
	} else if err := f.Truncate(file.Size); err != nil {
		return nil, err
	}
	image, err := attachOnce(f, o.Pool.Name)
	if err != nil {
		return nil, err
	}
	s := &source{exclusive: true, image: &image}
	options := []string{"noatime"}
	if file.Sparse {
		options = append(options, "discard")
	}
	if s.dir, err = mountPool(ctx, o, image.Path, image.Number, options); err != nil {
		if detachErr := image.Detach(ctx); !errors.Is(detachErr, loop.ErrBusy) {
			err = errors.Join(err, detachErr)
		}
		return nil, err
	}
	return s, nil
}

// attachOnce attaches a pool's image, or finds the device that it is on.
func attachOnce(f *os.File, name string) (loop.Device, error) {
	found, err := loop.Find(f)
	if err != nil {
		return loop.Device{}, err
	}
	if len(found) > 0 {
		return found[0], found[0].Refresh()
	}
	return loop.Attach(f, loop.Options{BlockSize: pool.SizeUnit, Label: name})
}

// makeFile makes the image file of a new pool with its filesystem.
func makeFile(ctx context.Context, file config.FileSource) (err error) {
	staged := file.Path + ".staging"
	if err := os.Remove(staged); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(staged, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(noSpace(err), os.Remove(staged))
		}
	}()
	if err := extent.Prepare(f, 0); err != nil {
		return err
	}
	if err := f.Truncate(file.Size); err != nil {
		return err
	}
	if !file.Sparse {
		if err := extent.Allocate(ctx, f, 0, file.Size); err != nil {
			return err
		}
	}
	if err := makePoolFilesystem(ctx, staged); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(staged, file.Path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file.Path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// makePoolFilesystem formats a pool's own filesystem. 4 KiB sectors let the
// image or the disk's copy move to a disk of either sector size.
func makePoolFilesystem(ctx context.Context, path string) error {
	return filesystem.Make(ctx, path, filesystem.XFS, []string{"-L", poolLabel, "-m", "reflink=1", "-s", "size=4096"})
}

// mustBeOurs refuses what does not carry a filesystem that was made for a pool.
func mustBeOurs(path, field string) error {
	info, err := filesystem.Probe(path)
	if errors.Is(err, filesystem.ErrNone) {
		return pool.Errorf(pool.ErrPrecondition, "%s: %s exists and is not a pool of this driver; nothing was changed", field, path)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	if info.Type != filesystem.XFS || info.Label != poolLabel {
		return pool.Errorf(pool.ErrPrecondition, "%s: %s has an %s filesystem (label %q) that was not made for a pool; nothing was changed. Mount it and use it as source.directory, or choose another", field, path, info.Type, info.Label)
	}
	return nil
}

// disk is a block device that is to be a pool.
type disk struct {
	path   string // resolved
	number uint64 // dev_t
	ours   bool   // has a pool's filesystem on it; else it is blank
}

// checkDevice checks a block device: it has a pool on it, or is blank.
func checkDevice(ctx context.Context, o Options, path string) (disk, error) {
	const field = "source.device"
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return disk{}, pool.Errorf(pool.ErrPrecondition, "%s: %s: %w", field, path, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(resolved, &st); err != nil {
		return disk{}, fmt.Errorf("%s: %s: %w", field, path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return disk{}, pool.Errorf(pool.ErrPrecondition, "%s: %s is not a block device", field, path)
	}
	d := disk{path: resolved, number: st.Rdev, ours: true}
	if _, err := filesystem.Probe(resolved); !errors.Is(err, filesystem.ErrNone) {
		return d, mustBeOurs(resolved, field)
	}
	if err := mustBeNew(o, field, path+" holds no pool"); err != nil {
		return disk{}, err
	}
	if err := mustBeBlank(ctx, resolved, st.Rdev); err != nil {
		return disk{}, fmt.Errorf("%s: %s cannot be made a pool: %w", field, path, err)
	}
	d.ours = false
	return d, nil
}

func openDevice(ctx context.Context, o Options, path string) (*source, error) {
	d, err := checkDevice(ctx, o, path)
	if err != nil {
		return nil, err
	}
	if !d.ours {
		if err := makePoolFilesystem(ctx, d.path); err != nil {
			return nil, fmt.Errorf("source.device: formatting %s: %w", path, err)
		}
	}
	dir, err := mountPool(ctx, o, d.path, d.number, []string{"noatime"})
	if err != nil {
		return nil, err
	}
	return &source{dir: dir, exclusive: true}, nil
}

// mountPool mounts a pool's own filesystem at its place in the state
// directory, or finds it there, and lets it span its device.
func mountPool(ctx context.Context, o Options, device string, number uint64, options []string) (string, error) {
	dir := filepath.Join(o.StateDir, "mounts", o.Pool.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	at, err := filesystem.MountAt(dir)
	switch {
	case errors.Is(err, filesystem.ErrNotMounted):
		entries, err := os.ReadDir(dir)
		if err != nil {
			return "", err
		}
		if len(entries) > 0 {
			return "", pool.Errorf(pool.ErrPrecondition, "%s should be empty, to mount the pool on; it has %q: see what wrote there", dir, entries[0].Name())
		}
		if err := filesystem.Mount(ctx, device, dir, filesystem.XFS, options, false); err != nil {
			return "", fmt.Errorf("mounting pool: %w", err)
		}
	case err != nil:
		return "", err
	case at.Device != number:
		return "", pool.Errorf(pool.ErrInUse, "%s has %s mounted on it, not %s; unmount it", dir, at.Source, device)
	}
	if err := filesystem.Grow(ctx, dir); err != nil {
		return "", fmt.Errorf("growing the pool's filesystem: %w", err)
	}
	return dir, nil
}

// record remembers in the state directory which pool a node had under a name,
// and where, so that an empty directory where a disk failed to mount is not
// taken for a new pool.
type record struct {
	ID     string `json:"id"`
	Source string `json:"source"`
}

func recordPath(o Options) string {
	return filepath.Join(o.StateDir, "pools", o.Pool.Name+".json")
}

// knownPool gives the ID of the pool that the node had at this very source;
// empty if it had none. Who configures another source means another place.
func knownPool(o Options) (id string, err error) {
	path := recordPath(o)
	root, err := os.OpenRoot(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer root.Close()
	var r record
	err = readMetadata(root, filepath.Base(path), &r)
	if errors.Is(err, fs.ErrNotExist) || err == nil && r.Source != o.Pool.Source.Path() {
		return "", nil
	}
	return r.ID, err
}

func writeRecord(o Options, id string) error {
	path := recordPath(o)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer root.Close()
	name := filepath.Base(path)
	return replaceMetadata(root, name, name+".staging", record{ID: id, Source: o.Pool.Source.Path()})
}
