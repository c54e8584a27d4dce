package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"sync"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// nearlyFull is the share of a pool's size below which its free blocks are too
// few to be left alone.
const nearlyFull = 0.03

// Health implements [pool.Engine]. What is to be done comes early in a message,
// which CSI cuts at 128 bytes.
func (e *Engine) Health(context.Context) []pool.Condition {
	var found []pool.Condition
	add := func(severity pool.Severity, reason, format string, args ...any) {
		found = append(found, pool.Condition{Severity: severity, Reason: reason, Message: "pool " + e.info.Name + ": " + fmt.Sprintf(format, args...)})
	}
	// A filesystem that was shut down after an error still answers from
	// memory; to bring something to the disk is what it cannot.
	if err := syncDir(e.root, "."); err != nil {
		add(pool.Inaccessible, "PoolFailed", "its filesystem fails; see the kernel log, mend the disk and restart the driver (%v)", err)
		return found
	}
	st, err := statfs(e.root)
	switch {
	case err != nil:
		add(pool.Inaccessible, "PoolUnreachable", "its filesystem cannot be reached; see the kernel log (%v)", err)
	case st.readOnly:
		add(pool.Inaccessible, "PoolReadOnly", "its filesystem is read-only; see the kernel log, mend it and remount it")
	case float64(st.available) < nearlyFull*float64(st.size):
		add(pool.Degraded, "PoolNearlyFull", "delete volumes or snapshots, or make it larger: %d of %d bytes are free", st.available, st.size)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if n := len(e.damagedVolumes.names) + len(e.damagedSnapshots.names); n > 0 {
		add(pool.Degraded, "MetadataDamaged", "%d volumes and snapshots have damaged metadata and were left alone, such as %v", n,
			slices.Concat(e.damagedVolumes.names, e.damagedSnapshots.names)[0])
	}
	for _, at := range slices.Sorted(maps.Keys(e.notes)) {
		add(pool.Degraded, "LeftOver", "%s %s", path.Join(e.dir, at), e.notes[at])
		break // one is enough to go and look; a reason is told once
	}
	return found
}

// Damaged implements [pool.Engine].
func (e *Engine) Damaged() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.damagedVolumes.names)
}

// VolumesHealth implements [pool.Engine]. Where the pool itself has failed, that
// is all that can be said of a volume.
func (e *Engine) VolumesHealth(ctx context.Context, names []string) (map[string][]pool.Condition, error) {
	all := map[string][]pool.Condition{}
	if len(names) == 0 {
		return all, nil
	}
	var failed []pool.Condition
	for _, c := range e.Health(ctx) {
		if c.Severity == pool.Inaccessible {
			failed = append(failed, c)
		}
	}
	table := sync.OnceValues(e.bound)
	for _, name := range names {
		found := failed
		if len(failed) == 0 {
			devices, err := e.loopsAmong(name, nil, table)
			if err != nil {
				return nil, err
			}
			found = e.volumeHealth(name, devices)
		}
		if len(found) > 0 {
			all[name] = found
		}
	}
	return all, nil
}

func (e *Engine) volumeHealth(name string, devices []loop.Device) []pool.Condition {
	v, err := e.Volume(name)
	switch {
	case errors.Is(err, pool.ErrDamaged):
		return []pool.Condition{{Severity: pool.Inaccessible, Reason: "MetadataDamaged", Message: fmt.Sprintf("restore its %s and restart the driver; until then the volume is left alone (%v)", volumeFile, err)}}
	case err != nil:
		return nil // deleted just now
	}
	var found []pool.Condition
	add := func(severity pool.Severity, reason, format string, args ...any) {
		found = append(found, pool.Condition{Severity: severity, Reason: reason, Message: fmt.Sprintf(format, args...)})
	}
	if err := e.readable(name); err != nil {
		if _, err := e.Volume(name); errors.Is(err, pool.ErrNotFound) {
			return nil
		}
		add(pool.Degraded, "MetadataDamaged", "before the driver restarts, restore its %s, or grow the volume, which writes it anew (%v)", volumeFile, err)
	}
	info, err := e.root.Lstat(path.Join(volumesDir, name, dataFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		add(pool.DataLoss, "ImageMissing", "its image is gone; restore the volume from a snapshot or a backup")
		return found
	case err != nil:
		add(pool.Inaccessible, "ImageUnreachable", "its image cannot be reached; see the kernel log (%v)", err)
		return found
	case !info.Mode().IsRegular():
		add(pool.DataLoss, "ImageReplaced", "its image is a %s; restore the volume from a snapshot or a backup", info.Mode().Type())
		return found
	case info.Size() < v.Size:
		add(pool.DataLoss, "ImageTruncated", "its image has %d bytes of %d; restore the volume from a snapshot or a backup", info.Size(), v.Size)
	}
	if slices.ContainsFunc(devices, func(d loop.Device) bool { return d.BackingDev != 0 && behind(d) != idOf(info) }) {
		add(pool.DataLoss, "ImageReplaced", "its user has a file that is no longer its image; save what is in it, then stop the user and start it again")
	}
	for _, d := range devices {
		if !d.DirectIO {
			add(pool.Degraded, "DirectIOUnavailable", "the kernel refused direct I/O, so data passes the page cache twice; a pool with smaller blocks avoids it")
			break
		}
	}
	return found
}
