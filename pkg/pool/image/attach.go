package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Attach implements [pool.Engine].
func (e *Engine) Attach(_ context.Context, name string, readOnly bool) (pool.Device, error) {
	v, err := e.Volume(name)
	if err != nil {
		return pool.Device{}, err
	}
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	data, err := e.openVolume(v, flag)
	if err != nil {
		return pool.Device{}, err
	}
	defer data.Close()
	devices, err := loop.Find(data)
	if err != nil {
		return pool.Device{}, err
	}
	for _, d := range devices {
		if d.ReadOnly != readOnly {
			if err := d.Flush(); err != nil {
				return pool.Device{}, err
			}
			continue
		}
		if err := d.Refresh(); err != nil {
			return pool.Device{}, fmt.Errorf("bringing %s to the size of volume %s: %w", d.Path, name, err)
		}
		if v.Provisioning == pool.Thick {
			if err := d.RefuseDiscard(); err != nil {
				return pool.Device{}, fmt.Errorf("keeping the blocks of volume %s: %w", name, err)
			}
		}
		return describe(d), nil
	}
	d, err := loop.Attach(data, loop.Options{
		ReadOnly:  readOnly,
		BlockSize: pool.SizeUnit,
		NoDiscard: v.Provisioning == pool.Thick,
		Label:     path.Join(e.info.Name, name),
	})
	if err != nil {
		return pool.Device{}, fmt.Errorf("attaching volume %s: %w", name, err)
	}
	return describe(d), nil
}

func describe(d loop.Device) pool.Device {
	return pool.Device{Path: d.Path, Number: d.Number, ReadOnly: d.ReadOnly, DirectIO: d.DirectIO}
}

// Devices implements [pool.Engine].
func (e *Engine) Devices(name string) ([]pool.Device, error) {
	if err := e.mustExist(name); err != nil {
		return nil, err
	}
	found, err := e.loops(name)
	if err != nil {
		return nil, err
	}
	devices := make([]pool.Device, len(found))
	for i, d := range found {
		devices[i] = describe(d)
	}
	return devices, nil
}

// mustExist refuses a name that no volume has, whole or damaged.
func (e *Engine) mustExist(name string) error {
	if _, err := e.Volume(name); !errors.Is(err, pool.ErrDamaged) {
		return err
	}
	return nil
}

// loops asks the kernel for the loop devices of a volume's image, whatever the
// image's state: its users must be able to leave.
func (e *Engine) loops(name string) ([]loop.Device, error) {
	image := path.Join(volumesDir, name, dataFile)
	data, err := e.open(image, os.O_RDONLY)
	if err != nil { // somebody has removed it, or the pool's filesystem has failed
		return e.loopsByPath(image)
	}
	defer data.Close()
	found, err := loop.Find(data)
	if err != nil || len(found) > 0 {
		return found, err
	}
	return e.loopsByPath(image) // somebody may have put another file in its place
}

// loopsByPath finds the loop devices of an image by the path that the kernel has
// kept of it.
func (e *Engine) loopsByPath(image string) ([]loop.Device, error) {
	all, err := e.bound()
	if err != nil {
		return nil, err
	}
	_, found := all.of(path.Join(e.resolved, image), nil)
	return found, nil
}

// bound is all loop devices of the machine, for who asks for those of many
// images.
type bound struct {
	pool   uint64 // the device of the pool's filesystem
	byFile map[fileID][]loop.Device
	byPath map[string][]loop.Device
}

// fileID is what makes a file the same one under any name.
type fileID struct{ dev, inode uint64 }

func (e *Engine) bound() (bound, error) {
	all, err := loop.All()
	if err != nil {
		return bound{}, err
	}
	b := bound{e.device, map[fileID][]loop.Device{}, map[string][]loop.Device{}}
	for _, d := range all {
		id := fileID{d.BackingDev, d.BackingInode}
		b.byFile[id] = append(b.byFile[id], d.Device)
		at := strings.TrimSuffix(d.File, " (deleted)")
		b.byPath[at] = append(b.byPath[at], d.Device)
	}
	return b, nil
}

func idOf(info fs.FileInfo) fileID {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}
	}
	return fileID{uint64(st.Dev), st.Ino}
}

// of gives the devices of the image at a path: its own, and those of another
// file that was there before. info tells what is there now; nil is nothing that
// can be asked, and then a device whose file cannot be asked is one of them. The
// same path may be that of another pool's image, in another mount namespace.
func (b bound) of(image string, info fs.FileInfo) (own, others []loop.Device) {
	var id fileID
	if info != nil {
		id = idOf(info)
		own = b.byFile[id]
	}
	for _, d := range b.byPath[image] {
		switch {
		case d.BackingDev == 0: // it cannot be asked
			if info == nil {
				others = append(others, d)
			}
		case d.BackingDev == b.pool && (fileID{d.BackingDev, d.BackingInode}) != id:
			others = append(others, d)
		}
	}
	return own, others
}

// Attached implements [pool.Engine].
func (e *Engine) Attached() (map[string][]pool.Device, error) {
	all, err := e.bound()
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	names := slices.Concat(e.volumes.names, e.damagedVolumes.names)
	e.mu.Unlock()
	attached := map[string][]pool.Device{}
	for _, name := range names {
		image := path.Join(volumesDir, name, dataFile)
		info, err := e.root.Lstat(image)
		if err != nil {
			info = nil // somebody has removed it, or the pool's filesystem has failed
		}
		found, others := all.of(path.Join(e.resolved, image), info)
		if len(found) == 0 {
			found = others
		}
		for _, d := range found {
			attached[name] = append(attached[name], describe(d))
		}
		slices.SortStableFunc(attached[name], func(a, b pool.Device) int {
			if a.ReadOnly == b.ReadOnly {
				return 0
			}
			if a.ReadOnly {
				return 1
			}
			return -1
		})
	}
	return attached, nil
}

// Detach implements [pool.Engine].
func (e *Engine) Detach(ctx context.Context, name string, device pool.Device) error {
	if err := e.mustExist(name); err != nil {
		return err
	}
	found, err := e.loops(name)
	if err != nil {
		return err
	}
	for _, d := range found {
		if d.Number != device.Number {
			continue
		}
		if err := mustBeReleased(name, d); err != nil {
			return err
		}
		err := d.Detach(ctx)
		switch {
		case errors.Is(err, loop.ErrBusy):
			return pool.Errorf(pool.ErrInUse, "volume %s: %w", name, err)
		case errors.Is(err, loop.ErrDetached):
			return nil
		case err != nil:
			return fmt.Errorf("detaching volume %s: %w", name, err)
		}
		// What somebody wrote and left in the page cache of the device, the
		// kernel has written to the image since, and no further.
		if err := e.sync(path.Join(volumesDir, name, dataFile)); err != nil {
			return fmt.Errorf("syncing volume %s: %w", name, err)
		}
	}
	return nil
}

// sync brings an image to stable storage; one that is gone is not there to be
// brought.
func (e *Engine) sync(image string) error {
	f, err := e.open(image, os.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, pool.ErrDamaged) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// mustBeReleased asks the kernel whether a device is mounted or handed out
// anywhere that we can see.
func mustBeReleased(name string, d loop.Device) error {
	mounts, nodes, err := filesystem.UsesOf(d.Number)
	if err != nil {
		return err
	}
	var paths []string
	for _, m := range append(mounts, nodes...) {
		paths = append(paths, m.Path)
	}
	if len(paths) > 0 {
		return pool.Errorf(pool.ErrInUse, "volume %s is in use: %s is mounted at %s", name, d.Path, strings.Join(paths, ", "))
	}
	return nil
}

// mustBeIdle asks the kernel whether a volume is attached.
func (e *Engine) mustBeIdle(name string) error {
	found, err := e.loops(name)
	if err != nil {
		return err
	}
	for _, d := range found {
		if err := mustBeReleased(name, d); err != nil {
			return err
		}
	}
	if len(found) > 0 {
		return pool.Errorf(pool.ErrInUse, "volume %s is in use: it is attached to %s; unstage it first", name, found[0].Path)
	}
	return nil
}
