// Package image is the storage engine that keeps every volume as one image file
// in a directory, attached through a loop device with direct I/O. A snapshot is
// a reflink of that file, a clone is a reflink the other way.
//
// The truth is the pool's directory:
//
//	orlop.json                            the pool's identity
//	volumes/<name>/{volume.json,data}
//	snapshots/<name>/{snapshot.json,data}
//	.staging/                             what is being made
//	.trash/                               what is being freed
//
// Everything is made in .staging, brought to stable storage, and then renamed
// into place; a deletion is a rename into .trash. The catalog in memory is read
// from the directory at start. What is attached and mounted is asked of the
// kernel each time; what is remembered of it is only whom to ask first.
//
// It touches nothing outside that directory (os.Root holds it to that) but the
// loop devices of its own files and, for a pool that has a filesystem of its
// own, that filesystem's mount.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/config"
	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// The directories and files of a pool.
const (
	identityFile = "orlop.json"
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	stagingDir   = ".staging"
	trashDir     = ".trash"
	dataFile     = "data"
	volumeFile   = "volume.json"
	snapshotFile = "snapshot.json"
	copyFile     = "copy.json"
)

// directories are all directories of a pool.
var directories = []string{volumesDir, snapshotsDir, stagingDir, trashDir}

// extentHint is the unit in which the filesystem of the pool lays out an image,
// in bytes. Larger means fewer extents, so that a snapshot of a volume that was
// written at random stalls its writer for less long; smaller means that a thin
// volume takes less space for small scattered writes.
const extentHint = 128 << 10

// Options is what an engine needs to know.
type Options struct {
	Node     string      // name of the node
	StateDir string      // for mounts and for records of the pools seen; must exist
	Pool     config.Pool // what the operator asked for
}

// identity is the content of orlop.json.
type identity struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	// Overhead is what the filesystem took for itself of FilesystemSize when
	// the pool was made, in bytes; zero where the filesystem is shared with
	// others.
	Overhead       int64 `json:"overhead,omitempty"`
	FilesystemSize int64 `json:"filesystemSize,omitempty"`
}

// snapshot is a snapshot and what is promised for it.
type snapshot struct {
	pool.Snapshot
	charge int64 // bytes that it may come to hold alone
}

// damage is a volume or snapshot that cannot be used.
type damage struct {
	err    error
	charge int64 // bytes its file takes
}

// Engine is one open pool. It implements [pool.Engine].
type Engine struct {
	info     pool.Info
	identity identity
	segment  string // the node's part of new IDs
	options  config.Pool
	source   *source
	dir      string
	resolved string // dir without symbolic links, as the kernel knows it
	root     *os.Root
	lock     *os.File // holds the flock on the pool's directory
	device   uint64   // st_dev of the directory
	ledger   *ledger
	sample   sample
	trash    trash
	holds    holds
	seen     devices
	syncs    map[string]*together // of volumes/ and snapshots/, which many calls change

	mu               sync.Mutex // guards what follows; never held across I/O
	volumes          catalog[pool.Volume]
	snapshots        catalog[snapshot]
	damagedVolumes   catalog[damage]
	damagedSnapshots catalog[damage]
	copies           catalog[copyRecord]
	notes            map[string]string   // oddities found in the pool, by path
	touched          map[string]struct{} // directories whose image the next census measures
}

var _ pool.Engine = (*Engine)(nil)

// Open makes a pool ready: it makes and mounts what its source asks for, claims
// the directory for this process, repairs what a crash left half-done, and
// reads the catalog. Nothing that may hold data is ever formatted or emptied.
func Open(ctx context.Context, o Options) (_ *Engine, err error) {
	segment, err := pool.NodeSegment(o.Node)
	if err != nil {
		return nil, err
	}
	src, err := openSource(ctx, o)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		segment: segment,
		options: o.Pool,
		source:  src,
		dir:     src.dir,
		ledger:  newLedger(o.Pool.Overcommit),
		trash:   trash{wake: make(chan struct{}, 1)},
		notes:   map[string]string{},
		touched: map[string]struct{}{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.release())
		}
	}()
	if e.root, err = os.OpenRoot(e.dir); err != nil {
		return nil, fmt.Errorf("opening pool directory: %w", err)
	}
	e.syncs = map[string]*together{}
	for _, dir := range []string{volumesDir, snapshotsDir} {
		e.syncs[dir] = &together{run: func() error { return syncDir(e.root, dir) }}
	}
	if e.resolved, err = filepath.EvalSymlinks(e.dir); err != nil {
		return nil, err
	}
	if err := e.claim(); err != nil {
		return nil, err
	}
	if err := e.identify(o); err != nil {
		return nil, err
	}
	reflink, err := e.tryReflink()
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// A full pool must be opened, or nothing in it could be deleted.
		reflink, err = e.askReflink()
	}
	if err != nil {
		return nil, fmt.Errorf("finding out whether %s can share blocks: %w", e.dir, err)
	}
	e.info = pool.Info{ID: e.identity.ID, Name: o.Pool.Name, Reflink: reflink}
	if err := e.recover(ctx); err != nil {
		return nil, err
	}
	e.trash.start(e.free)
	return e, nil
}

// claim takes the pool for this process, until the process ends.
func (e *Engine) claim() error {
	lock, err := e.root.Open(".")
	if err != nil {
		return err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return pool.Errorf(pool.ErrInUse, "%s is in use by another process; a pool belongs to one driver", e.dir)
		}
		return fmt.Errorf("locking %s: %w", e.dir, err)
	}
	e.lock = lock
	info, err := lock.Stat() // now: once the filesystem has failed, nobody can tell
	if err != nil {
		return err
	}
	e.device = idOf(info).dev
	return nil
}

// identify reads the pool's identity, or gives a directory that holds nothing
// its identity and so makes it a pool.
func (e *Engine) identify(o Options) error {
	known, err := knownPool(o)
	if err != nil {
		return err
	}
	err = readMetadata(e.root, identityFile, &e.identity)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := mustBeNew(o, "source", e.dir+" holds no pool"); err != nil {
			return err
		}
		if err := e.initialise(); err != nil {
			return fmt.Errorf("making %s a pool: %w", e.dir, err)
		}
	case err != nil:
		return err
	case known != "" && known != e.identity.ID:
		return pool.Errorf(pool.ErrPrecondition, "source: %s holds pool %s, but this node's pool %q was %s: is the right disk mounted? If it is meant, remove %s", e.dir, e.identity.ID, o.Pool.Name, known, recordPath(o))
	}
	for _, dir := range directories {
		if info, err := e.root.Lstat(dir); err != nil || !info.IsDir() {
			return pool.Errorf(pool.ErrDamaged, "%s should be a directory of the pool and is not; restore it from where it went, nothing was changed", path.Join(e.dir, dir))
		}
	}
	if known == "" {
		return writeRecord(o, e.identity.ID)
	}
	return nil
}

// initialise makes an empty directory a pool. The identity comes last: without
// it, what an earlier try left (empty directories) still counts as empty.
func (e *Engine) initialise() error {
	if err := mustBeUnused(e.root.FS()); err != nil {
		return err
	}
	for _, dir := range directories {
		if err := e.root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	e.identity = identity{ID: pool.NewPoolID(), Created: time.Now().UTC()}
	if e.source.exclusive {
		stat, err := statfs(e.root)
		if err != nil {
			return err
		}
		e.identity.FilesystemSize = stat.size
		e.identity.Overhead = stat.size - stat.free
	}
	return replaceMetadata(e.root, identityFile, path.Join(stagingDir, identityFile), e.identity)
}

// mustBeUnused refuses a directory that has anything in it but what making it a
// pool may have left.
func mustBeUnused(dir fs.FS) error {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		if name == "lost+found" || name == stagingDir {
			continue
		}
		if slices.Contains(directories, name) {
			if inside, err := fs.ReadDir(dir, name); err != nil || len(inside) == 0 {
				continue
			}
		}
		return pool.Errorf(pool.ErrPrecondition, "the directory is not empty (it has %q); give the pool a directory of its own", name)
	}
	return nil
}

// tryReflink finds out whether the pool's filesystem can share blocks between
// files, by doing it.
func (e *Engine) tryReflink() (ok bool, err error) {
	from, to := path.Join(stagingDir, "reflink-from"), path.Join(stagingDir, "reflink-to")
	defer func() {
		for _, name := range []string{from, to} {
			if rmErr := e.root.Remove(name); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
	}()
	src, err := e.root.OpenFile(from, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return false, err
	}
	defer src.Close()
	dst, err := e.root.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return false, err
	}
	defer dst.Close()
	if _, err := src.Write(make([]byte, pool.SizeUnit)); err != nil {
		return false, err
	}
	err = extent.Clone(dst, src)
	if errors.Is(err, extent.ErrUnsupported) {
		return false, nil
	}
	return err == nil, err
}

// askReflink finds out the same where there is no room to try it.
func (e *Engine) askReflink() (bool, error) {
	f, err := openRegular(e.root, identityFile, os.O_RDWR)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return extent.Shares(f)
}

// Info implements [pool.Engine].
func (e *Engine) Info() pool.Info { return e.info }

// Close implements [pool.Engine]. A filesystem that was mounted for the pool is
// unmounted unless a volume is still attached.
func (e *Engine) Close() error {
	e.Thaw()
	e.trash.stop()
	return e.release()
}

func (e *Engine) release() error {
	var errs []error
	if e.root != nil {
		errs = append(errs, e.root.Close())
	}
	if e.lock != nil {
		errs = append(errs, e.lock.Close())
	}
	return errors.Join(append(errs, e.source.close())...)
}

// note remembers an oddity at a path of the pool, for Health to tell.
func (e *Engine) note(at, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.notes[at] = text
}

// Counts implements [pool.Engine].
func (e *Engine) Counts() pool.Counts {
	e.mu.Lock()
	defer e.mu.Unlock()
	return pool.Counts{
		Volumes:   len(e.volumes.names),
		Snapshots: len(e.snapshots.names),
		Damaged:   len(e.damagedVolumes.names) + len(e.damagedSnapshots.names),
	}
}
