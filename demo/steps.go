package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// demo is what one step leaves to the next.
type demo struct {
	dir    string // everything is in it
	size   int64  // of the files, bytes
	fsType string // of the filesystem volumes
	why    string // it is that type, if there is something to explain
	driver *driver
	out    *report
	errOut *os.File

	taken, peak int64 // blocks of the pool's file: now, and at most; bytes
	empty       int64 // the same when the pool was new
	room        int64 // that a new pool can promise, bytes

	files, disk                 *volume // what everything else is made from
	filesClone, diskClone       *volume
	restored                    *volume
	snapshot                    *csi.Snapshot
	written, changed            tree      // the content of files, first and last
	wrote                       []*extent // the content of disk, first and last
	rewrote                     []*extent
	open                        *os.File // disk, held open as a database would
	writer                      *writer
	snapshotCut, cloneCut       cut
	filesReadOnly, diskReadOnly string
}

// step is one of the things that are shown.
type step struct {
	title string
	do    func(*demo, context.Context) (result, error)
}

var steps = []step{
	{"Start the driver on a new pool", (*demo).startDriver},
	{"Create a filesystem volume and a block volume", (*demo).createVolumes},
	{"Stage and publish both", (*demo).publishVolumes},
	{"Write files", (*demo).writeFiles},
	{"Write to the block volume, with O_DIRECT", (*demo).writeDisk},
	{"Snapshot, while a writer appends and fsyncs", (*demo).takeSnapshot},
	{"Grow both to twice the size, in use", (*demo).growVolumes},
	{"Clone both, in use", (*demo).cloneVolumes},
	{"Overwrite and delete in the originals", (*demo).changeOriginals},
	{"Restore the snapshot to a larger volume", (*demo).restoreSnapshot},
	{"Read everything back, all side by side", (*demo).verifyAll},
	{"Publish read-only, and try to write", (*demo).tryReadOnly},
	{"Kill the driver (SIGKILL), start it again", (*demo).killDriver},
	{"List volumes, snapshots and capacity", (*demo).list},
	{"Delete everything", (*demo).deleteAll},
	{"Stop the driver and look for leftovers", (*demo).stopDriver},
}

// The sizes of the volumes follow from the size of the data, and that of the
// pool from theirs: it promises to each volume its full size.

func (d *demo) filesSize() int64 { return max(gib, (2*d.size+gib-1)/gib*gib) }
func (d *demo) diskSize() int64  { return max(64*mib, d.size/2/mib*mib) }

func (d *demo) poolSize() int64 {
	grown, copies := 2*(d.filesSize()+d.diskSize()), 2*(d.filesSize()+d.diskSize())
	restored, snapshot := 3*d.filesSize(), d.filesSize()
	return (grown+copies+restored+snapshot)/4*5/gib*gib + gib // with a fifth to spare, for the reserve
}

// blocks tells what the pool's file takes on this machine's disk, once the pool
// has brought everything there.
func (d *demo) blocks() (int64, error) {
	mounts, err := mountsBelow(filepath.Join(d.dir, "state"))
	if err != nil {
		return 0, err
	}
	for _, m := range mounts {
		if err := syncFilesystem(m.path); err != nil {
			return 0, err
		}
	}
	return blocksOf(d.driver.image())
}

func (d *demo) startDriver(ctx context.Context) (result, error) {
	for _, sub := range []string{"state", "staging", "targets"} {
		if err := os.Mkdir(filepath.Join(d.dir, sub), 0o700); err != nil {
			return result{}, err
		}
	}
	if err := d.driver.configure(d.poolSize()); err != nil {
		return result{}, err
	}
	start := time.Now()
	if err := d.driver.start(ctx); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	info, err := d.driver.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return result{}, err
	}
	if d.room, err = d.driver.available(ctx); err != nil {
		return result{}, err
	}
	if d.empty, err = d.blocks(); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("%s %s, with a pool of %s in one sparse file", info.GetName(), info.GetVendorVersion(), human(d.poolSize())),
	}}, nil
}

func (d *demo) createVolumes(ctx context.Context) (_ result, err error) {
	if d.files, err = d.driver.create(ctx, "files", d.filesSize(), mounted(d.fsType), nil); err != nil {
		return result{}, err
	}
	if d.disk, err = d.driver.create(ctx, "disk", d.diskSize(), raw(), nil); err != nil {
		return result{}, err
	}
	notes := []string{fmt.Sprintf("\"files\" of %s, for %s; \"disk\" of %s, raw", human(d.files.size), d.fsType, human(d.disk.size))}
	if d.why != "" {
		notes = append(notes, "("+d.why+")")
	}
	return result{notes: notes}, nil
}

func (d *demo) publishVolumes(ctx context.Context) (result, error) {
	start := time.Now()
	if err := d.driver.use(ctx, d.files, d.disk); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	m, err := mountAt(d.driver.target(d.files))
	if err != nil {
		return result{}, err
	}
	if m.fsType != d.fsType {
		return result{}, fmt.Errorf("%s has %s mounted, not %s", m.path, m.fsType, d.fsType)
	}
	if d.open, err = os.OpenFile(d.driver.target(d.disk), os.O_RDWR, 0); err != nil {
		return result{}, err
	}
	if size, err := d.open.Seek(0, io.SeekEnd); err != nil || size != d.disk.size {
		return result{}, errors.Join(err, fmt.Errorf("the block device has %d bytes, not %d", size, d.disk.size))
	}
	room, err := roomIn(m.path)
	if err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("\"files\" was formatted and is mounted, with room for %s;", human(room)),
		"\"disk\" is a block device at its target path",
	}}, nil
}

func (d *demo) writeFiles(ctx context.Context) (_ result, err error) {
	start := time.Now()
	if d.written, err = writeTree(ctx, d.driver.target(d.files), d.size); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	return result{took, []string{
		fmt.Sprintf("%s in %s files, each with its SHA-256; %s a second", human(d.size), count(int64(len(d.written))), rate(d.size, took)),
	}}, nil
}

func (d *demo) writeDisk(ctx context.Context) (result, error) {
	half := d.diskSize() / 4 / mib * mib
	d.wrote = []*extent{{offset: 0, length: half}, {offset: half, length: half}}
	start := time.Now()
	for _, e := range d.wrote {
		if err := e.write(ctx, d.driver.target(d.disk)); err != nil {
			return result{}, err
		}
	}
	took := time.Since(start)
	return result{took, []string{
		fmt.Sprintf("%s, with its SHA-256; %s a second", human(2*half), rate(2*half, took)),
	}}, nil
}

func (d *demo) takeSnapshot(ctx context.Context) (_ result, err error) {
	if d.writer, err = startWriter(filepath.Join(d.driver.target(d.files), recordsFile)); err != nil {
		return result{}, err
	}
	if err := d.writer.advance(ctx, warmUp); err != nil {
		return result{}, err
	}
	_, usual := d.writer.pauses()
	var took, longest time.Duration
	d.snapshotCut, longest, err = d.writer.during(ctx, func() error {
		start := time.Now()
		response, err := d.driver.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "before", SourceVolumeId: d.files.id})
		d.snapshot, took = response.GetSnapshot(), time.Since(start)
		return err
	})
	if err != nil {
		return result{}, err
	}
	if err := d.cheaperThan(d.size); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("the writer's longest pause: %s (a record usually takes it %s)", duration(longest), duration(usual)),
	}}, nil
}

func (d *demo) growVolumes(ctx context.Context) (result, error) {
	target := d.driver.target(d.files)
	before, err := roomIn(target)
	if err != nil {
		return result{}, err
	}
	diskBefore := d.disk.size
	var took time.Duration
	_, longest, err := d.writer.during(ctx, func() error {
		start := time.Now()
		err := d.driver.grow(ctx, d.files, 2*d.files.size)
		if err == nil {
			err = d.driver.grow(ctx, d.disk, 2*d.disk.size)
		}
		took = time.Since(start)
		return err
	})
	if err != nil {
		return result{}, err
	}
	after, err := roomIn(target)
	if err != nil {
		return result{}, err
	}
	if after <= before {
		return result{}, fmt.Errorf("the filesystem has room for %d bytes, and had for %d before", after, before)
	}
	if err := d.spanned(d.files); err != nil {
		return result{}, err
	}
	size, err := d.open.Seek(0, io.SeekEnd)
	if err != nil {
		return result{}, err
	}
	if size != d.disk.size {
		return result{}, fmt.Errorf("the open block device has %d bytes, not %d", size, d.disk.size)
	}
	return result{took, []string{
		fmt.Sprintf("the mounted filesystem has room for %s more: %s, from %s;", human(after-before), human(after), human(before)),
		fmt.Sprintf("the open device %s, from %s; the writer's longest pause: %s", human(size), human(diskBefore), duration(longest)),
	}}, nil
}

// cheaperThan checks that a step has shared that many bytes, and not copied
// them: that it has taken less than half of it on disk.
func (d *demo) cheaperThan(n int64) error {
	taken, err := d.blocks()
	if err == nil && taken-d.taken > n/2 {
		err = fmt.Errorf("it took %d bytes on disk, where %d were to be shared", taken-d.taken, n)
	}
	return err
}

// spanned checks that a volume's filesystem spans it, but for what it keeps for
// itself: that is never an eighth of it.
func (d *demo) spanned(v *volume) error {
	room, err := roomIn(d.driver.target(v))
	if err == nil && room < v.size/8*7 {
		err = fmt.Errorf("volume %s has %d bytes, and its filesystem room for %d only", v.name, v.size, room)
	}
	return err
}

func (d *demo) cloneVolumes(ctx context.Context) (_ result, err error) {
	start := time.Now()
	if d.diskClone, err = d.driver.create(ctx, "disk-clone", d.disk.size, raw(), fromVolume(d.disk)); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	var longest time.Duration
	d.cloneCut, longest, err = d.writer.during(ctx, func() (err error) {
		start := time.Now()
		d.filesClone, err = d.driver.create(ctx, "files-clone", d.files.size, mounted(d.fsType), fromVolume(d.files))
		took += time.Since(start)
		return err
	})
	if err != nil {
		return result{}, err
	}
	data := d.size + d.wrote[0].length + d.wrote[1].length
	if err := d.cheaperThan(data); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("two volumes of their own, which share %s with their sources;", human(data)),
		"the writer's longest pause: " + duration(longest),
	}}, nil
}

// changeOriginals does what copies must not notice. What it overwrites, it
// overwrites in place, where the blocks are shared.
func (d *demo) changeOriginals(ctx context.Context) (_ result, err error) {
	target := d.driver.target(d.files)
	d.changed = maps.Clone(d.written)
	names := slices.Sorted(maps.Keys(d.written))
	start := time.Now()
	var deleted, overwritten int
	for i, name := range names {
		path := filepath.Join(target, name)
		switch i % 4 {
		case 0:
			if err := os.Remove(path); err != nil {
				return result{}, err
			}
			delete(d.changed, name)
			deleted++
		case 1:
			info, err := os.Stat(path)
			if err != nil {
				return result{}, err
			}
			if d.changed[name], err = writeFile(path, io.LimitReader(noise(), info.Size())); err != nil {
				return result{}, err
			}
			overwritten++
		}
	}
	if err := syncFilesystem(target); err != nil {
		return result{}, err
	}
	first := &extent{offset: 0, length: d.wrote[0].length}
	if err := first.write(ctx, d.driver.target(d.disk)); err != nil {
		return result{}, err
	}
	d.rewrote = []*extent{first, d.wrote[1]}
	return result{time.Since(start), []string{
		fmt.Sprintf("%d files deleted, %d overwritten in place, and half of what is on \"disk\"", deleted, overwritten),
	}}, nil
}

func (d *demo) restoreSnapshot(ctx context.Context) (_ result, err error) {
	start := time.Now()
	if d.restored, err = d.driver.create(ctx, "files-restored", 3*d.filesSize(), mounted(d.fsType), fromSnapshot(d.snapshot)); err != nil {
		return result{}, err
	}
	if err := d.driver.use(ctx, d.restored); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	if err := d.spanned(d.restored); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("created, staged and published; from %s to %s, and its filesystem", human(d.snapshot.GetSizeBytes()), human(d.restored.size)),
		"spans all of it",
	}}, nil
}

func (d *demo) verifyAll(ctx context.Context) (result, error) {
	if err := d.driver.use(ctx, d.filesClone, d.diskClone); err != nil {
		return result{}, err
	}
	start := time.Now()
	var files int
	for _, c := range []struct {
		v    *volume
		want tree
	}{{d.files, d.changed}, {d.filesClone, d.written}, {d.restored, d.written}} {
		if err := verifyTree(ctx, d.driver.target(c.v), c.want); err != nil {
			return result{}, err
		}
		files += len(c.want)
	}
	if err := verifyDisk(ctx, d.driver.target(d.disk), d.rewrote); err != nil {
		return result{}, err
	}
	if err := verifyDisk(ctx, d.driver.target(d.diskClone), d.wrote); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	inSnapshot, err := d.recordsIn(d.restored, d.snapshotCut)
	if err != nil {
		return result{}, fmt.Errorf("the snapshot: %w", err)
	}
	inClone, err := d.recordsIn(d.filesClone, d.cloneCut)
	if err != nil {
		return result{}, fmt.Errorf("the clone: %w", err)
	}
	return result{took, []string{
		fmt.Sprintf("%s files in three volumes, and two block volumes: every SHA-256 is", count(int64(files))),
		"right, of the copies as before the changes, of the originals as after",
		fmt.Sprintf("the snapshot ends with record %s: %s were on disk when it was asked for,", count(inSnapshot), count(d.snapshotCut.before)),
		fmt.Sprintf("%s was the first begun after it was done (clone: %s; %s, %s)", count(d.snapshotCut.after+1),
			count(inClone), count(d.cloneCut.before), count(d.cloneCut.after+1)),
	}}, nil
}

func (d *demo) recordsIn(v *volume, c cut) (int64, error) {
	n, err := readRecords(filepath.Join(d.driver.target(v), recordsFile), d.writer.key)
	if err != nil {
		return 0, err
	}
	return n, c.holds(n)
}

func verifyDisk(ctx context.Context, path string, extents []*extent) error {
	for _, e := range extents {
		if err := e.verify(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) tryReadOnly(ctx context.Context) (result, error) {
	filesTarget := d.driver.target(d.filesClone) + "-read-only"
	diskTarget := d.driver.target(d.diskClone) + "-read-only"
	start := time.Now()
	if err := d.driver.publish(ctx, d.filesClone, filesTarget, true); err != nil {
		return result{}, err
	}
	d.filesReadOnly = filesTarget
	if err := d.driver.publish(ctx, d.diskClone, diskTarget, true); err != nil {
		return result{}, err
	}
	d.diskReadOnly = diskTarget
	took := time.Since(start)

	existing := filepath.Join(filesTarget, slices.Min(slices.Collect(maps.Keys(d.written))))
	for what, err := range map[string]error{
		"creating a file":         tryOpen(filepath.Join(filesTarget, "new"), os.O_CREATE|os.O_WRONLY),
		"opening one for writing": tryOpen(existing, os.O_WRONLY),
		"removing one":            os.Remove(existing),
		"making a folder":         os.Mkdir(filepath.Join(filesTarget, "folder"), 0o700),
	} {
		if !errors.Is(err, syscall.EROFS) {
			return result{}, fmt.Errorf("read-only publication of a filesystem: %s gave %w, not \"read-only file system\"", what, orSuccess(err))
		}
	}
	overwrite := *d.wrote[0]
	diskErr := overwrite.write(ctx, diskTarget)
	if !errors.Is(diskErr, syscall.EPERM) && !errors.Is(diskErr, syscall.EACCES) && !errors.Is(diskErr, syscall.EROFS) {
		return result{}, fmt.Errorf("read-only publication of a block device: writing gave %w", orSuccess(diskErr))
	}
	if err := verifyTree(ctx, filesTarget, d.written); err != nil {
		return result{}, err
	}
	if err := verifyDisk(ctx, diskTarget, d.wrote); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("creating, changing, removing files: %q;", syscall.EROFS.Error()),
		fmt.Sprintf("writing to the device: %q; all is as it was", rootCause(diskErr).Error()),
	}}, nil
}

// tryOpen opens a file and closes it.
func tryOpen(path string, flags int) error {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// orSuccess gives the absence of an error a name.
func orSuccess(err error) error {
	if err == nil {
		return errors.New("success")
	}
	return err
}

// rootCause gives the system's own error.
func rootCause(err error) error {
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		return number
	}
	return err
}

func (d *demo) killDriver(ctx context.Context) (result, error) {
	loops, err := loopsBelow(d.dir)
	if err != nil {
		return result{}, err
	}
	known, err := d.driver.listVolumes(ctx)
	if err != nil {
		return result{}, err
	}
	var took time.Duration
	var alone int64
	_, longest, err := d.writer.during(ctx, func() error {
		if err := d.driver.kill(); err != nil {
			return err
		}
		before := d.writer.durable.Load()
		if err := d.writer.advance(ctx, warmUp); err != nil {
			return err
		}
		if err := verifyDisk(ctx, d.driver.target(d.disk), d.rewrote); err != nil {
			return err
		}
		alone = d.writer.durable.Load() - before
		start := time.Now()
		err := d.driver.start(ctx)
		took = time.Since(start)
		return err
	})
	if err != nil {
		return result{}, err
	}

	// An orchestrator repeats itself; what is so already must be found so.
	if err := d.driver.use(ctx, d.files, d.disk, d.filesClone, d.diskClone, d.restored); err != nil {
		return result{}, err
	}
	loopsNow, err := loopsBelow(d.dir)
	if err != nil {
		return result{}, err
	}
	if !slices.Equal(loops, loopsNow) {
		return result{}, fmt.Errorf("volumes in use are on other loop devices now: %v, not %v", loopsNow, loops)
	}
	knownNow, err := d.driver.listVolumes(ctx)
	if err != nil {
		return result{}, err
	}
	if !maps.Equal(known, knownNow) {
		return result{}, fmt.Errorf("there are other volumes now: %v, not %v", knownNow, known)
	}
	return result{took, []string{
		fmt.Sprintf("with no driver the writer wrote %s records, and no error; all volumes are", count(alone)),
		fmt.Sprintf("in use as before, on %d loop devices; the writer's longest pause: %s", len(loops), duration(longest)),
	}}, nil
}

func (d *demo) list(ctx context.Context) (result, error) {
	start := time.Now()
	volumes, err := d.driver.listVolumes(ctx)
	if err != nil {
		return result{}, err
	}
	snapshots, err := d.driver.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return result{}, err
	}
	room, err := d.driver.available(ctx)
	if err != nil {
		return result{}, err
	}
	took := time.Since(start)
	want, promised := map[string]bool{}, int64(0)
	for _, v := range d.volumes() {
		want[v.id] = true
		promised += v.size
	}
	if !maps.Equal(volumes, want) {
		return result{}, fmt.Errorf("ListVolumes has %v, not %v", volumes, want)
	}
	if entries := snapshots.GetEntries(); len(entries) != 1 || entries[0].GetSnapshot().GetSnapshotId() != d.snapshot.GetSnapshotId() {
		return result{}, fmt.Errorf("ListSnapshots has %v, not %s alone", entries, d.snapshot.GetSnapshotId())
	}
	if room > d.room-promised {
		return result{}, fmt.Errorf("GetCapacity has %d bytes; a new pool had %d, and %d are promised to volumes", room, d.room, promised)
	}
	return result{took, []string{
		fmt.Sprintf("%d volumes, %d snapshot; %s are promised to them, %s are left", len(volumes), len(snapshots.GetEntries()), human(d.room-room), human(room)),
	}}, nil
}

func (d *demo) volumes() []*volume {
	return []*volume{d.files, d.disk, d.filesClone, d.diskClone, d.restored}
}

func (d *demo) deleteAll(ctx context.Context) (result, error) {
	if _, err := d.driver.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: d.files.id}); status.Code(err) != codes.FailedPrecondition {
		return result{}, fmt.Errorf("DeleteVolume of a mounted volume gave %w, not %s", orSuccess(err), codes.FailedPrecondition)
	}
	d.writer.stop()
	if err := d.writer.failure(); err != nil {
		return result{}, err
	}
	n, err := readRecords(filepath.Join(d.driver.target(d.files), recordsFile), d.writer.key)
	if err != nil {
		return result{}, err
	}
	if n != d.writer.durable.Load() {
		return result{}, fmt.Errorf("%d records are in the volume, and the writer wrote %d", n, d.writer.durable.Load())
	}
	if err := d.open.Close(); err != nil {
		return result{}, err
	}
	start := time.Now()
	if err := d.driver.unpublish(ctx, d.filesClone, d.filesReadOnly); err != nil {
		return result{}, err
	}
	if err := d.driver.unpublish(ctx, d.diskClone, d.diskReadOnly); err != nil {
		return result{}, err
	}
	for _, v := range d.volumes() {
		if err := d.driver.release(ctx, v); err != nil {
			return result{}, err
		}
		if _, err := d.driver.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}); err != nil {
			return result{}, err
		}
	}
	if _, err := d.driver.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: d.snapshot.GetSnapshotId()}); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	if err := d.poolIsEmpty(ctx); err != nil {
		return result{}, err
	}
	return result{took, []string{
		fmt.Sprintf("a try to delete \"files\" while mounted was refused, and its %s records", count(n)),
		"were complete to the last; then the pool gave its blocks back to the disk",
	}}, nil
}

// poolIsEmpty waits until what was deleted is freed, and checks that the pool
// is as it was when it was new.
func (d *demo) poolIsEmpty(ctx context.Context) error {
	// The pool's filesystem keeps blocks that it has used for itself.
	slack := 4*mib + d.size/256
	for deadline := time.Now().Add(20 * time.Second); ; {
		room, err := d.driver.available(ctx)
		if err != nil {
			return err
		}
		taken, err := d.blocks()
		if err != nil {
			return err
		}
		if room == d.room && taken <= d.empty+slack {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the empty pool has room for %d bytes and takes %d; when it was new it had room for %d and took %d", room, taken, d.room, d.empty)
		}
		time.Sleep(20 * time.Millisecond)
	}
	volumes, err := d.driver.listVolumes(ctx)
	if err != nil {
		return err
	}
	snapshots, err := d.driver.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	if len(volumes) > 0 || len(snapshots.GetEntries()) > 0 {
		return fmt.Errorf("these are still listed: %v, %v", volumes, snapshots.GetEntries())
	}
	return nil
}

// stopDriver stops the driver, looks for what should not be there any more, and
// removes what is meant to be there.
func (d *demo) stopDriver(context.Context) (result, error) {
	start := time.Now()
	if err := d.driver.stop(); err != nil {
		return result{}, err
	}
	took := time.Since(start)
	mounts, err := mountsBelow(d.dir)
	if err != nil {
		return result{}, err
	}
	loops, err := loopsBelow(d.dir)
	if err != nil {
		return result{}, err
	}
	if len(mounts) > 0 || len(loops) > 0 {
		return result{}, fmt.Errorf("still mounted: %v; still attached: %v", mounts, loops)
	}
	for _, sub := range []string{"staging", "targets"} {
		entries, err := os.ReadDir(filepath.Join(d.dir, sub))
		if err != nil {
			return result{}, err
		}
		if len(entries) > 0 {
			return result{}, fmt.Errorf("still in %s: %v", sub, entries)
		}
	}
	if err := d.remove(); err != nil {
		return result{}, err
	}
	return result{took, []string{
		"no mount, no loop device, no staging or target path is left;",
		"the pool's file and its directory are removed",
	}}, nil
}

// remove removes the temporary directory, in which nothing may be mounted any
// more.
func (d *demo) remove() error {
	if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	if _, err := os.Lstat(d.dir); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, fmt.Errorf("%s is still there", d.dir))
	}
	return nil
}

// clean undoes everything, however far it went. After the last step there is
// nothing to do.
func (d *demo) clean() error {
	if d.writer != nil {
		d.writer.quit.Store(true)
	}
	err := d.driver.end(syscall.SIGTERM)
	if err != nil {
		err = fmt.Errorf("csi-driver: %w", err)
	}
	if d.open != nil {
		d.open.Close()
	}
	if d.writer != nil {
		if err := thawBelow(d.dir); err != nil { // or the writer may wait for ever
			return err
		}
		d.writer.stop()
	}
	if undoErr := undo(d.dir); undoErr != nil {
		return errors.Join(err, undoErr)
	}
	return errors.Join(err, d.remove())
}

func rate(n int64, took time.Duration) string {
	return human(int64(float64(n) / took.Seconds()))
}
