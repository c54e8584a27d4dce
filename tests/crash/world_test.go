//go:build integration

package crash

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/tests/harness"
)

const mib = int64(1) << 20

// defaultPatience bounds how long a writer may be held up, how long the driver
// may take to free what was deleted, and how long a call that comes too early
// may have to be repeated: a start of the driver on a busy machine, and no more.
const defaultPatience = 20 * time.Second

// world is a driver with a pool, a volume in it that has nothing to do with
// what is tried, and all that can be seen of it from outside.
type world struct {
	*harness.Driver

	t     *testing.T
	at    string                           // what is being tried, for the failure
	pool  string                           // the pool's directory
	room  int64                            // bytes that the pool can promise when it is empty
	fresh bool                             // the pool is a new one, whose room is not known yet
	kinds map[string]*csi.VolumeCapability // by volume, as the rest
	sums  map[string]string                // of what note has written
	live  map[string]*harness.Recorder
	user  *os.File // has a device open
	floor int64    // records of the live source that the call must find
	disk  *disk    // on which everything of the driver is, if the power can fail
	pod   string   // the cgroup of a pod that has the volume "raw", if there is one

	patience time.Duration
}

// newWorld starts a driver with a pool on the machine's own disk, and a bystander
// unless it would be in the way.
func newWorld(t *testing.T, alone bool) *world {
	t.Helper()
	return begin(t, harness.Start(t, harness.FilePool("4Gi")), "state/mounts/default", nil, alone)
}

// newWorldOn starts a driver on a disk of its own: one with XFS, which has a
// pool in an image file, or with ext4, which has one in a directory.
func newWorldOn(t *testing.T, fsType string, alone bool) *world {
	t.Helper()
	disk := newDisk(t, fsType)
	dir := filepath.Join(disk.dir, "driver")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	config, pool := harness.FilePool("4Gi"), "state/mounts/default"
	if fsType == "ext4" {
		config, pool = harness.DirectoryPool("$DIR/pool"), "pool"
		if err := os.Mkdir(filepath.Join(dir, "pool"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	d := harness.NewIn(t, dir, config)
	d.Start()
	return begin(t, d, pool, disk, alone)
}

func begin(t *testing.T, d *harness.Driver, pool string, disk *disk, alone bool) *world {
	t.Helper()
	w := &world{
		Driver: d, t: t, at: "setup", disk: disk,
		pool:  filepath.Join(d.Dir, pool),
		kinds: map[string]*csi.VolumeCapability{}, sums: map[string]string{}, live: map[string]*harness.Recorder{},
		patience: defaultPatience,
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("it was: %s", w.at)
		}
	})
	if text := os.Getenv("ORLOP_CRASH_PATIENCE"); text != "" {
		limit, err := time.ParseDuration(text)
		w.must(err)
		w.patience = limit
	}
	w.room = w.available()
	if !alone {
		w.source("bystander", 64*mib, harness.Mount("ext4", harness.Writer))
	}
	return w
}

// must fails the test if err is not nil.
func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatalf("%s: %v", w.at, err)
	}
}

// source makes a volume in use, with data at rest and a writer.
func (w *world) source(name string, size int64, c *csi.VolumeCapability) {
	w.t.Helper()
	w.Create(name, size, c)
	w.use(name, c)
	w.note(name)
	at, offset := w.log(name)
	w.live[name] = write(w.t, at, offset, 0)
}

// note writes data to a volume that is in use, brings it to stable storage, and
// remembers it.
func (w *world) note(name string) {
	w.t.Helper()
	data := make([]byte, 256<<10)
	rand.Read(data)
	f, err := os.OpenFile(w.file(name), os.O_WRONLY|os.O_CREATE, 0o600)
	w.must(err)
	defer f.Close()
	_, err = f.Write(data)
	w.must(err)
	w.must(f.Sync())
	w.sums[name] = sum(data)
}

// file is what is written to in a published volume: a file, or the device.
func (w *world) file(name string) string {
	target := w.Target(name)
	if info, err := os.Stat(target); err == nil && !info.IsDir() {
		return target
	}
	return filepath.Join(target, "file")
}

// log is where the writer of a published volume writes.
func (w *world) log(name string) (at string, offset int64) {
	if at := w.file(name); at == w.Target(name) {
		return at, mib
	}
	return filepath.Join(w.Target(name), "writer"), 0
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// holds fails the test unless a published volume has the data that was written
// to it, or to what it was copied from.
func (w *world) holds(name, origin string) {
	w.t.Helper()
	w.must(w.held(name, origin))
}

func (w *world) held(name, origin string) error {
	f, err := os.Open(w.file(name))
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, 256<<10)
	if _, err := io.ReadFull(f, data); err != nil {
		return err
	}
	if sum(data) != w.sums[origin] {
		return fmt.Errorf("volume %s has not the data of %s", name, origin)
	}
	return nil
}

// id is the ID of a volume or snapshot: an orchestrator that was told none can
// find it with ListVolumes.
func (w *world) id(name string) string {
	w.t.Helper()
	var identity struct {
		Payload struct {
			ID string `json:"id"`
		} `json:"payload"`
	}
	w.read("orlop.json", &identity)
	return harness.NodeID + "/" + identity.Payload.ID + "/" + name
}

// read reads a metadata file of the pool.
func (w *world) read(name string, v any) {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.pool, name))
	w.must(err)
	w.must(json.Unmarshal(text, v))
}

func (w *world) available() int64 {
	w.t.Helper()
	response, err := w.GetCapacity(w.Context(), &csi.GetCapacityRequest{})
	w.must(err)
	return response.GetAvailableCapacity()
}

// until repeats a call while it is refused with one of the codes, as an
// orchestrator does.
func (w *world) until(call func(context.Context) error, repeat ...codes.Code) error {
	for deadline := time.Now().Add(w.patience); ; time.Sleep(20 * time.Millisecond) {
		err := call(w.Context())
		if err == nil || !slices.Contains(repeat, status.Code(err)) || time.Now().After(deadline) {
			return err
		}
	}
}

// gone does what an orchestrator does to be rid of a volume, whatever has
// become of it.
func (w *world) gone(name, volumeID string) {
	w.t.Helper()
	w.leave(name, volumeID)
	w.end("DeleteVolume", func(ctx context.Context) error {
		_, err := w.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: volumeID})
		return err
	})
}

// leave unpublishes and unstages a volume, whatever has become of it.
func (w *world) leave(name, volumeID string) {
	w.t.Helper()
	if live := w.live[name]; live != nil {
		w.must(live.End())
		delete(w.live, name)
	}
	w.unpublished(name, volumeID)
	w.end("NodeUnstageVolume", func(ctx context.Context) error {
		_, err := w.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volumeID, StagingTargetPath: w.Staging(name)})
		if status.Code(err) == codes.NotFound {
			return nil
		}
		return err
	})
	w.must(os.Remove(w.Staging(name))) // empty, as the orchestrator made it
}

func (w *world) unpublished(name, volumeID string) {
	w.t.Helper()
	w.end("NodeUnpublishVolume", func(ctx context.Context) error {
		_, err := w.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volumeID, TargetPath: w.Target(name)})
		return err
	})
}

func (w *world) uncut(name string) {
	w.t.Helper()
	w.end("DeleteSnapshot", func(ctx context.Context) error {
		_, err := w.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: w.id(name)})
		return err
	})
}

// end repeats a call that undoes something until it succeeds. A program that
// outlived the driver may still have the device.
func (w *world) end(what string, call func(context.Context) error) {
	w.t.Helper()
	if err := w.until(call, codes.Aborted, codes.FailedPrecondition); err != nil {
		w.t.Fatalf("%s: %s: %v", w.at, what, err)
	}
}

// seen is what can be seen of a world from outside.
type seen struct {
	lines    []string // what there is; the same for the same state
	problems []string // what must never be
}

// look describes the world, once what was deleted is freed: the files of the
// pool, what the driver lists, loop devices, mounts, and paths; and it finds
// what must never be, such as an orphan or a frozen filesystem.
func (w *world) look() seen {
	w.t.Helper()
	var s seen
	s.problem(w.settle(func() bool { return false }))
	w.lookAtPaths(&s)
	devices := w.lookAtDevices(&s)
	w.lookAtMounts(&s, devices)
	w.lookAtPool(&s)
	w.lookAtHealth(&s)
	s.problem(w.podGoesOn())
	for name, live := range w.live {
		s.problem(live.Progress(w.patience))
		if longest := time.Duration(live.Longest.Load()); longest > w.patience {
			s.problem(fmt.Errorf("the writer of %s was held up for %s", name, longest))
		}
		s.problem(w.held(name, name))
	}
	slices.Sort(s.lines)
	return s
}

func (s *seen) linef(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *seen) problem(err error) {
	if err != nil {
		s.problems = append(s.problems, err.Error())
	}
}

// lookAtHealth asks the driver how its pools are.
func (w *world) lookAtHealth(s *seen) {
	w.t.Helper()
	health, err := w.NodeGetStorageHealth(w.Context(), &csi.NodeGetStorageHealthRequest{})
	w.must(err)
	for _, h := range health.GetBackendHealth() {
		s.problem(fmt.Errorf("health: %v", h))
	}
}

// settle waits until nothing is being made or freed in the pool, or until there
// is no reason to wait.
func (w *world) settle(enough func() bool) error {
	for deadline := time.Now().Add(w.patience); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		for _, dir := range []string{".staging", ".trash"} {
			names, err := filepath.Glob(filepath.Join(w.pool, dir, "*"))
			w.must(err)
			left = append(left, names...)
		}
		if len(left) == 0 || enough() {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not removed: %s", strings.Join(left, ", "))
		}
	}
}

// lookAtPaths lists the paths outside of the pool.
func (w *world) lookAtPaths(s *seen) {
	w.t.Helper()
	for _, dir := range []string{".", "staging", "targets", "state", "state/pools", "state/mounts"} {
		entries, err := os.ReadDir(filepath.Join(w.Dir, dir))
		if errors.Is(err, fs.ErrNotExist) && dir == "state/mounts" {
			continue // of a pool in a directory
		}
		w.must(err)
		for _, entry := range entries {
			s.linef("path %s", path.Join(dir, entry.Name()))
		}
	}
}

// lookAtDevices lists the loop devices of files below the driver's directory,
// and gives those files by the devices' names.
func (w *world) lookAtDevices(s *seen) map[string]string {
	w.t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	w.must(err)
	devices := map[string]string{}
	for _, file := range files {
		// One that is gone meanwhile is somebody else's.
		backing, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(backing), w.Dir+"/") {
			continue
		}
		sys := filepath.Dir(filepath.Dir(file))
		attribute := func(name string) string {
			text, err := os.ReadFile(filepath.Join(sys, name))
			w.must(err)
			return strings.TrimSpace(string(text))
		}
		of := strings.TrimPrefix(strings.TrimSpace(string(backing)), w.Dir+"/")
		devices[filepath.Base(sys)] = of
		s.linef("device of %s, sectors %s, read-only %s, direct %s, discard %s", of, attribute("size"), attribute("ro"), attribute("loop/dio"), attribute("queue/discard_max_bytes"))
		if attribute("loop/autoclear") != "0" {
			s.problem(fmt.Errorf("the device of %s will vanish when its last user closes it", of))
		}
	}
	return devices
}

// lookAtMounts lists what is mounted below the driver's directory, and tries to
// write to it.
func (w *world) lookAtMounts(s *seen, devices map[string]string) {
	w.t.Helper()
	mounts, err := filesystem.Mounts()
	w.must(err)
	for _, m := range mounts {
		at, below := strings.CutPrefix(m.Path, w.Dir+"/")
		if !below {
			continue
		}
		node := m.Type == "devtmpfs"
		of := filepath.Base(m.Source)
		if node {
			of = filepath.Base(m.Root)
		}
		s.linef("mount %s of %s, device node %t, read-only %t", at, devices[of], node, m.ReadOnly)
		if !node && !m.ReadOnly && m.Path != w.pool {
			s.problem(writable(m.Path, w.patience))
		}
	}
}

// writable finds out whether a filesystem takes a write: a frozen one makes it
// wait.
func writable(dir string, limit time.Duration) error {
	done := make(chan error, 1)
	go func() {
		f, err := os.CreateTemp(dir, "probe-")
		if err == nil {
			err = errors.Join(f.Sync(), f.Close(), os.Remove(f.Name()))
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return fmt.Errorf("%s is frozen: a write hangs", dir)
	}
}

// lookAtPool lists the files of the pool and what the driver says of them. What
// is available and what is promised for the files must add up.
func (w *world) lookAtPool(s *seen) {
	w.t.Helper()
	listed := map[string]bool{}
	volumes, err := w.ListVolumes(w.Context(), &csi.ListVolumesRequest{})
	w.must(err)
	for _, e := range volumes.GetEntries() {
		name := path.Base(e.GetVolume().GetVolumeId())
		listed["volumes/"+name] = true
		s.linef("volume %s, %d bytes", name, e.GetVolume().GetCapacityBytes())
	}
	snapshots, err := w.ListSnapshots(w.Context(), &csi.ListSnapshotsRequest{})
	w.must(err)
	for _, e := range snapshots.GetEntries() {
		name := path.Base(e.GetSnapshot().GetSnapshotId())
		listed["snapshots/"+name] = true
		s.linef("snapshot %s of %s, %d bytes, ready %t", name, path.Base(e.GetSnapshot().GetSourceVolumeId()), e.GetSnapshot().GetSizeBytes(), e.GetSnapshot().GetReadyToUse())
	}
	var promised int64
	err = filepath.WalkDir(w.pool, func(at string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(at, w.pool), "/")
		dir := path.Dir(name)
		switch {
		case entry.Name() == "data":
			info, err := entry.Info()
			if err != nil {
				return err
			}
			s.linef("file %s, %d bytes", name, info.Size())
			if stat, ok := info.Sys().(*syscall.Stat_t); ok && strings.HasPrefix(name, "snapshots/") {
				promised += stat.Blocks * 512
			} else {
				promised += info.Size()
			}
			if !listed[dir] && !w.inline(dir) {
				s.problem(fmt.Errorf("%s is an orphan: nobody knows of it", dir))
			}
		case entry.Name() == "volume.json":
			s.linef("file %s, content %s", name, w.metadata(dir).Content)
		default:
			s.linef("file %s", name)
		}
		return nil
	})
	w.must(err)
	for dir := range listed {
		if _, err := os.Stat(filepath.Join(w.pool, dir, "data")); err != nil {
			s.problem(fmt.Errorf("%s is listed and not there: %w", dir, err))
		}
	}
	s.problem(w.accounts(promised))
}

// shared is how far the room of a pool may be off that shares its filesystem with
// others, in bytes: what they write there, and the filesystem for itself, is not
// the pool's. It is less than any volume has.
const shared = 32 * mib

// accounts is an error unless what is available and what is promised add up to
// the room of the pool.
func (w *world) accounts(promised int64) error {
	w.t.Helper()
	exact := w.disk == nil || w.disk.fsType != "ext4"
	for deadline := time.Now().Add(w.patience); ; time.Sleep(20 * time.Millisecond) {
		available := w.available()
		excess := available + promised - w.room
		switch {
		case excess == 0:
			return nil
		case w.fresh && -mib < excess && excess < mib:
			w.room, w.fresh = available+promised, false
			return nil
		case !exact && -shared < excess && excess < shared:
			return nil
		case exact || time.Now().After(deadline): // the driver looks at a shared filesystem once a second
			return fmt.Errorf("%d bytes are available and %d promised, which is %d too many", available, promised, excess)
		}
	}
}

type metadata struct {
	Content   string      `json:"content"`
	Ephemeral bool        `json:"ephemeral"`
	Limits    pool.Limits `json:"limits"`
}

func (w *world) metadata(dir string) metadata {
	w.t.Helper()
	var envelope struct {
		Payload metadata `json:"payload"`
	}
	w.read(path.Join(dir, "volume.json"), &envelope)
	return envelope.Payload
}

// inline tells whether a directory is that of an inline volume, which the driver
// does not list.
func (w *world) inline(dir string) bool {
	w.t.Helper()
	_, err := os.Stat(filepath.Join(w.pool, dir, "volume.json"))
	return err == nil && w.metadata(dir).Ephemeral
}

// compare fails the test unless the world is as it should be.
func (w *world) compare(what string, got seen, want []string) {
	w.t.Helper()
	var wrong []string
	for _, problem := range got.problems {
		wrong = append(wrong, "problem: "+problem)
	}
	for _, line := range differ(got.lines, want) {
		wrong = append(wrong, "too much: "+line)
	}
	for _, line := range differ(want, got.lines) {
		wrong = append(wrong, "missing: "+line)
	}
	if len(wrong) > 0 {
		w.t.Fatalf("%s: %s:\n%s", w.at, what, strings.Join(wrong, "\n"))
	}
}

// differ gives the lines of a that b has not, or not as often.
func differ(a, b []string) []string {
	left := slices.Clone(b)
	var lines []string
	for _, line := range a {
		if i := slices.Index(left, line); i >= 0 {
			left = slices.Delete(left, i, i+1)
		} else {
			lines = append(lines, line)
		}
	}
	return lines
}

// try lets the operation run until the driver is killed at the point, or to its
// end and that of the work in the background that follows.
func (w *world) try(o operation, at point, family bool) *tracer {
	w.t.Helper()
	tr, err := w.tried(o, at, family)
	if tr.killed.Load() {
		w.Kill()
	} else {
		w.must(err)
	}
	return tr
}

// tried is try for an operation that may fail, with its error.
func (w *world) tried(o operation, at point, family bool) (*tracer, error) {
	w.t.Helper()
	var tr *tracer
	var err error
	if o.call == nil {
		w.Launch(func(cmd *exec.Cmd) error {
			tr, err = launch(cmd, w.Dir, at, family)
			return err
		})
		err = w.Serves()
	} else {
		tr, err = attach(w.Pid(), w.Dir, at, family)
		w.must(err)
		err = o.call(w.Context(), w)
	}
	if err == nil && at.errno == 0 {
		err = w.settle(tr.killed.Load)
	}
	tr.end()
	w.must(tr.failed)
	return tr, err
}
