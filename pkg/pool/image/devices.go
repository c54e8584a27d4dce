package image

import (
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/orlop-csi/orlop/pkg/loop"
)

// devices remembers, by volume, the loop devices of images, so that a call need
// not look at all of the machine. It is where to look first and never an answer:
// each device is asked what it is bound to before it is believed.
type devices struct {
	mu   sync.Mutex
	seen map[string][]loop.Device
}

func (d *devices) remember(volume string, found ...loop.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(found) == 0 {
		delete(d.seen, volume)
		return
	}
	if d.seen == nil {
		d.seen = map[string][]loop.Device{}
	}
	d.seen[volume] = slices.SortedStableFunc(slices.Values(found), writableFirst)
}

func writableFirst(a, b loop.Device) int {
	switch {
	case a.ReadOnly == b.ReadOnly:
		return 0
	case a.ReadOnly:
		return 1
	}
	return -1
}

// known gives what is still bound as it was when it was seen.
func (d *devices) known(volume string) []loop.Device {
	d.mu.Lock()
	found := slices.Clone(d.seen[volume])
	d.mu.Unlock()
	return slices.DeleteFunc(found, func(one loop.Device) bool { return one.Check() != nil })
}

// volumes lists the volumes that have been seen attached.
func (d *devices) volumes() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := make([]string, 0, len(d.seen))
	for name := range d.seen {
		names = append(names, name)
	}
	return names
}

// loops asks the kernel for the loop devices of a volume's image, whatever the
// image's state: its users must be able to leave. The writable ones come first.
func (e *Engine) loops(volume string) ([]loop.Device, error) {
	return e.loopsAmong(volume, nil, e.bound)
}

// loopsOf is loops for who has the image open, as the only one.
func (e *Engine) loopsOf(volume string, data *os.File) ([]loop.Device, error) {
	return e.loopsAmong(volume, data, e.bound)
}

// loopsAmong is loops with a way to all devices of the machine, which is taken
// where the kernel cannot be asked directly. Those that the driver has attached,
// or seen, it asks. If there is none, an image that nobody has open is free. Only
// an image that somebody else has open is looked for everywhere, and one that
// cannot be opened, because somebody has removed it or the pool's filesystem has
// failed.
//
// So a device that another program attaches beside one of the driver's is seen
// when that is detached.
func (e *Engine) loopsAmong(volume string, data *os.File, all func() (bound, error)) ([]loop.Device, error) {
	if known := e.seen.known(volume); len(known) > 0 {
		return known, nil
	}
	image := path.Join(volumesDir, volume, dataFile)
	if data == nil {
		if f, err := e.open(image, os.O_RDONLY); err == nil {
			defer f.Close()
			data = f
		}
	}
	var info fs.FileInfo // nil: there is nothing that can be asked
	if data != nil {
		if loop.Unused(data) {
			e.detached(volume)
			return nil, nil
		}
		info, _ = data.Stat()
	}
	table, err := all()
	if err != nil {
		return nil, err
	}
	found := table.of(path.Join(e.resolved, image), info)
	slices.SortStableFunc(found, writableFirst)
	e.seen.remember(volume, found...)
	return found, nil
}

// detached forgets the devices of a volume. Nobody writes to its image any more.
func (e *Engine) detached(volume string) {
	e.seen.remember(volume)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.worked(path.Join(volumesDir, volume))
}

// bound is all loop devices of the machine.
type bound struct {
	pool   uint64 // the device of the pool's filesystem
	byFile map[fileID][]loop.Device
	byPath map[string][]loop.Device
}

// fileID is what makes a file the same one under any name.
type fileID struct{ dev, inode uint64 }

func idOf(info fs.FileInfo) fileID {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}
	}
	return fileID{uint64(st.Dev), st.Ino}
}

func behind(d loop.Device) fileID { return fileID{d.BackingDev, d.BackingInode} }

func (e *Engine) bound() (bound, error) {
	all, err := loop.All()
	if err != nil {
		return bound{}, err
	}
	b := bound{e.device, map[fileID][]loop.Device{}, map[string][]loop.Device{}}
	for _, d := range all {
		id := behind(d.Device)
		b.byFile[id] = append(b.byFile[id], d.Device)
		at := strings.TrimSuffix(d.File, " (deleted)")
		b.byPath[at] = append(b.byPath[at], d.Device)
	}
	return b, nil
}

// of gives the devices of the image at a path, or if it has none, those of
// another file that was there before, by the path that the kernel has kept of
// it, and those of one that cannot be asked. info tells what is there now; nil is
// nothing that can be asked. The same path may be that of another pool's image,
// in another mount namespace.
func (b bound) of(image string, info fs.FileInfo) []loop.Device {
	var found []loop.Device
	if info != nil {
		found = slices.Clone(b.byFile[idOf(info)])
	}
	if len(found) == 0 {
		for _, d := range b.byPath[image] {
			if d.BackingDev == b.pool || d.BackingDev == 0 {
				found = append(found, d)
			}
		}
	}
	return found
}
