package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// nearlyFull is the share of a pool's size below which its free blocks are too
// few to be left alone.
const nearlyFull = 0.03

// Health implements [pool.Engine].
func (e *Engine) Health(context.Context) []pool.Condition {
	var found []pool.Condition
	add := func(severity pool.Severity, reason, format string, args ...any) {
		found = append(found, pool.Condition{Severity: severity, Reason: reason, Message: "pool " + e.info.Name + ": " + fmt.Sprintf(format, args...)})
	}
	// A filesystem that was shut down after an error still answers from
	// memory; to bring something to the disk is what it cannot.
	if err := syncDir(e.root, "."); err != nil {
		add(pool.Inaccessible, "PoolFailed", "its filesystem fails (%v); see the kernel log, mend the disk and restart the driver", err)
		return found
	}
	st, err := statfs(e.root)
	switch {
	case err != nil:
		add(pool.Inaccessible, "PoolUnreachable", "%v", err)
	case st.readOnly:
		add(pool.Inaccessible, "PoolReadOnly", "its filesystem is read-only; see the kernel log, mend it and remount it")
	case float64(st.available) < nearlyFull*float64(st.size):
		add(pool.Degraded, "PoolNearlyFull", "%d of %d bytes are free; delete volumes or snapshots, or make the pool larger", st.available, st.size)
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

// VolumeHealth implements [pool.Engine].
func (e *Engine) VolumeHealth(_ context.Context, name string) ([]pool.Condition, error) {
	v, err := e.Volume(name)
	if errors.Is(err, pool.ErrDamaged) {
		return []pool.Condition{{Severity: pool.Inaccessible, Reason: "MetadataDamaged", Message: err.Error()}}, nil
	}
	if err != nil {
		return nil, err
	}
	var found []pool.Condition
	add := func(severity pool.Severity, reason, format string, args ...any) {
		found = append(found, pool.Condition{Severity: severity, Reason: reason, Message: fmt.Sprintf(format, args...)})
	}
	if _, err := e.readVolume(name); err != nil {
		add(pool.Degraded, "MetadataDamaged", "the metadata on disk was damaged while the driver ran (%v): it is good in memory until the driver restarts; grow the volume or restore the file to write it anew", err)
	}
	info, err := e.root.Lstat(path.Join(volumesDir, name, dataFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		add(pool.DataLoss, "ImageMissing", "its image is gone; restore the volume from a snapshot or a backup")
		return found, nil
	case err != nil:
		add(pool.Inaccessible, "ImageUnreachable", "its image cannot be reached: %v", err)
		return found, nil
	case !info.Mode().IsRegular():
		add(pool.DataLoss, "ImageReplaced", "its image is a %s", info.Mode().Type())
		return found, nil
	case info.Size() < v.Size:
		add(pool.DataLoss, "ImageTruncated", "its image has %d bytes of %d; restore the volume from a snapshot or a backup", info.Size(), v.Size)
	}
	devices, err := e.loops(name)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if !d.DirectIO {
			add(pool.Degraded, "DirectIOUnavailable", "%s passes the page cache twice, because the kernel refused direct I/O on the image; a pool whose blocks are no larger than the device's avoids it", d.Path)
			break
		}
	}
	return found, nil
}
