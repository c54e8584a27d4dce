package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

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
	devices, err := e.attachedTo(name, data, readOnly)
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
	e.seen.remember(name, append(devices, d)...)
	return describe(d), nil
}

// attachedTo gives the devices of a volume's image. Where a writable one is
// wanted, there is none that it does not give: two, and each had a page cache of
// its own.
func (e *Engine) attachedTo(name string, data *os.File, readOnly bool) ([]loop.Device, error) {
	info, err := data.Stat()
	if err != nil {
		return nil, err
	}
	found, err := e.loopsOf(name, data)
	if err != nil {
		return nil, err
	}
	own := slices.DeleteFunc(found, func(d loop.Device) bool { return behind(d) != idOf(info) })
	if readOnly || len(own) > 0 && !own[0].ReadOnly || loop.Unused(data) {
		return own, nil
	}
	return loop.Find(data)
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

// Attached implements [pool.Engine].
func (e *Engine) Attached(names []string) (map[string][]pool.Device, error) {
	attached := map[string][]pool.Device{}
	all := sync.OnceValues(e.bound)
	for _, name := range names {
		found, err := e.loopsAmong(name, nil, all)
		if err != nil {
			return nil, err
		}
		for _, d := range found {
			attached[name] = append(attached[name], describe(d))
		}
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
		if !errors.Is(err, loop.ErrBusy) {
			e.detached(name)
		}
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
