package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

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
	return loop.Find(data)
}

// loopsByPath finds the loop devices of an image that cannot be opened by the
// path that the kernel has kept of it, which it marks once the file is removed
// (proc_pid_fd(5) has the same of open files).
func (e *Engine) loopsByPath(image string) ([]loop.Device, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	was := path.Join(e.resolved, image)
	var found []loop.Device
	for _, file := range files {
		text, err := os.ReadFile(file)
		if backing := strings.TrimSuffix(string(text), "\n"); err != nil || backing != was && backing != was+" (deleted)" {
			continue // or detached just now
		}
		node := path.Join("/dev", strings.Split(file, "/")[3])
		var st unix.Stat_t
		if err := unix.Stat(node, &st); err != nil {
			return nil, err
		}
		d, err := loop.Get(st.Rdev)
		switch {
		case errors.Is(err, loop.ErrDetached):
			continue
		case errors.Is(err, loop.ErrUnasked): // enough to find its mounts; Detach will refuse it
			d = loop.Device{Path: node, Number: st.Rdev}
		case err != nil:
			return nil, err
		}
		found = append(found, d)
	}
	return found, nil
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
