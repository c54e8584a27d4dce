//go:build integration

package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/chaos/model"
)

// look compares everything that can be seen of the machines with the world, while
// no call is under way. Of the operations that are open each may have had its
// effect or not.
//
// In a fleet, copies between nodes go on without a call, and what they have left is
// removed a little later; so there it is the last look within some time that counts.
func (r *run) look(open []model.Operation) error {
	for deadline := time.Now().Add(r.patience); ; time.Sleep(50 * time.Millisecond) {
		err := r.lookOnce(open)
		if err == nil || r.site.quiet() || time.Now().After(deadline) {
			return err
		}
	}
}

// copies is what there may be of copies between nodes that are under way.
type copies struct {
	entries map[string]bool // in the pool's directory
	room    int64           // that they are promised at most, in bytes
}

func (r *run) copies(open []model.Operation) copies {
	c := copies{entries: map[string]bool{}}
	if r.site.quiet() {
		return c
	}
	for _, o := range open {
		if o.FromVolume+o.FromSnapshot == "" {
			continue
		}
		c.entries[".staging/copy-"+o.Volume] = true
		c.entries[".staging/metadata-"+o.Volume] = true
		c.entries["snapshots/"+pool.NameFor(request.CopyName(o.Volume))] = true
		c.room += o.Size
	}
	return c
}

func (r *run) lookOnce(open []model.Operation) error {
	ctx, cancel := context.WithTimeout(context.Background(), 4*r.patience)
	defer cancel()
	r.mu.Lock()
	allowed := r.world.Allowed(open)
	r.mu.Unlock()
	facts := map[string]string{}
	var problems []error
	for _, m := range r.site.nodes() {
		own, err := r.lookAt(ctx, m, r.copies(open))
		problems = append(problems, err)
		for what, value := range own {
			if _, twice := facts[what]; twice {
				problems = append(problems, fmt.Errorf("%s is on two nodes", what))
			}
			facts[what] = value
		}
	}
	problems = append(problems, r.lookAtRouter(ctx, facts))
	for what, values := range allowed {
		if values[""] && len(values) > 1 && strings.HasPrefix(what, model.FactTarget) {
			values[empty] = true // between the path's making and its mount, or after that
		}
		if got := facts[what]; !values[got] {
			problems = append(problems, fmt.Errorf("%s is %q, and must be %s", what, got, oneOf(values)))
		}
	}
	for what, value := range facts {
		if allowed[what] == nil {
			problems = append(problems, fmt.Errorf("%s is %q, and must not be", what, value))
		}
	}
	problems = append(problems, r.lookAtWriters())
	err := errors.Join(problems...)
	if err != nil && len(open) > 0 {
		err = fmt.Errorf("%w\nwhile these were under way: %v", err, open)
	}
	return err
}

// lookAtRouter compares what a router lists with what its nodes do.
func (r *run) lookAtRouter(ctx context.Context, facts map[string]string) error {
	if r.site.quiet() {
		return nil // there is none
	}
	routed := map[string]string{}
	if _, err := lookAtLists(ctx, r.site.client(), routed); err != nil {
		return err
	}
	var problems []error
	for what, value := range routed {
		if facts[what] != value {
			problems = append(problems, fmt.Errorf("the router lists %s as %q, and the nodes as %q", what, value, facts[what]))
		}
	}
	for what := range facts {
		if _, ok := routed[what]; !ok && (strings.HasPrefix(what, model.FactVolume) || strings.HasPrefix(what, model.FactSnapshot)) {
			problems = append(problems, fmt.Errorf("the router does not list %s", what))
		}
	}
	return errors.Join(problems...)
}

// empty is how a target is published at which nothing is mounted.
const empty = "empty"

func oneOf(values map[string]bool) string {
	var list []string
	for v := range values {
		list = append(list, strconv.Quote(v))
	}
	slices.Sort(list)
	return strings.Join(list, " or ")
}

// lookAt gives the facts of one machine, and what must never be there.
func (r *run) lookAt(ctx context.Context, m *machine, c copies) (map[string]string, error) {
	if err := r.settle(m, c); err != nil {
		return nil, err
	}
	facts := map[string]string{}
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	names, err := lookAtLists(ctx, m.node.controller, facts)
	if err != nil {
		return nil, err
	}
	promised, err := m.lookAtPool(names, c, problem)
	if err != nil {
		return nil, err
	}
	devices, err := m.lookAtDevices(names, facts, problem)
	if err != nil {
		return nil, err
	}
	if err := m.lookAtMounts(devices, facts, r.patience, problem); err != nil {
		return nil, err
	}
	available, err := m.available(ctx)
	if err != nil {
		return nil, err
	}
	if excess := available + promised - m.room; excess > 0 || excess < -c.room {
		problem("%d bytes are available and %d promised, which is %d too many", available, promised, excess)
	}
	health, err := m.node.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	if err != nil {
		return nil, err
	}
	for _, h := range health.GetBackendHealth() {
		problem("health: %v", h)
	}
	return facts, errors.Join(problems...)
}

// settle waits until nothing is being made or freed in the pool.
func (r *run) settle(m *machine, c copies) error {
	for deadline := time.Now().Add(r.patience); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		for _, dir := range []string{".staging", ".trash"} {
			names, err := filepath.Glob(filepath.Join(m.pool, dir, "*"))
			if err != nil {
				return err
			}
			left = append(left, names...)
		}
		left = slices.DeleteFunc(left, func(name string) bool { return c.entries[".staging/"+filepath.Base(name)] })
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not removed: %s", strings.Join(left, ", "))
		}
	}
}

// lookAtLists takes in what a driver lists, and gives the names in the world of
// the directories of the pool.
func lookAtLists(ctx context.Context, c clients, facts map[string]string) (names map[string]string, err error) {
	volumes, snapshots, err := listed(ctx, c, 0)
	if err != nil {
		return nil, err
	}
	names = map[string]string{}
	for _, v := range volumes {
		name := path.Base(v.GetVolumeId())
		names["volumes/"+name] = name
		facts[model.FactVolume+name] = strconv.FormatInt(v.GetCapacityBytes(), 10)
	}
	for _, s := range snapshots {
		name, of := path.Base(s.GetSnapshotId()), path.Base(s.GetSourceVolumeId())
		dir := name
		if id := s.GetGroupSnapshotId(); id != "" {
			group := path.Base(id)
			if want := pool.NameFor(pool.Group{Name: group}.SnapshotName(s.GetSourceVolumeId())); name != want {
				return nil, fmt.Errorf("snapshot %s of group %s and volume %s should be %s", name, group, of, want)
			}
			name = group + "/" + of
		}
		names["snapshots/"+dir] = name
		facts[model.FactSnapshot+name] = fmt.Sprintf("of %s, %d", of, s.GetSizeBytes())
	}
	return names, nil
}

// lookAtPool looks at the files of the pool: those of what is listed, and no
// others. It gives what must be promised for them.
func (m *machine) lookAtPool(names map[string]string, c copies, problem func(string, ...any)) (promised int64, err error) {
	found := map[string]bool{}
	err = filepath.WalkDir(m.pool, func(at string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(at, m.pool), "/")
		dir := path.Dir(name)
		if dir == "volumes" || dir == "snapshots" {
			found[name] = true
			if _, known := names[name]; !known && !c.entries[name] {
				problem("%s is an orphan: nobody knows of it", name)
			}
		}
		if entry.Name() != "data" {
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && strings.HasPrefix(name, "snapshots/") {
			promised += stat.Blocks * 512
		} else {
			promised += info.Size()
		}
		return nil
	})
	for dir := range names {
		if !found[dir] {
			problem("%s is listed and not there", dir)
		}
	}
	return promised, err
}

// lookAtDevices takes in the loop devices of the pool's files, and gives those
// files' volumes by the devices' names.
func (m *machine) lookAtDevices(names, facts map[string]string, problem func(string, ...any)) (devices map[string]string, err error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	devices = map[string]string{}
	for _, file := range files {
		backing, err := os.ReadFile(file) // one that is gone meanwhile is somebody else's
		of, ours := strings.CutPrefix(strings.TrimSpace(string(backing)), m.pool+"/")
		if err != nil || !ours {
			continue
		}
		sys := filepath.Dir(filepath.Dir(file))
		attribute := func(name string) string {
			text, err := os.ReadFile(filepath.Join(sys, name))
			if err != nil {
				problem("device of %s: %v", of, err)
			}
			return strings.TrimSpace(string(text))
		}
		name, known := names[path.Dir(of)]
		if !known {
			problem("there is a device of %s", of)
			continue
		}
		sectors, err := strconv.ParseInt(attribute("size"), 10, 64)
		if err != nil {
			return nil, err
		}
		what := model.FactDevice + name
		if attribute("ro") == "1" {
			what = model.FactReader + name
		}
		if _, twice := facts[what]; twice {
			problem("%s: there are two", what)
		}
		facts[what] = strconv.FormatInt(sectors*512, 10)
		devices[filepath.Base(sys)] = name
		if attribute("loop/autoclear") != "0" {
			problem("the device of %s will vanish when its last user closes it", of)
		}
	}
	return devices, nil
}

// lookAtMounts takes in what is staged and published, and looks for paths that
// nobody needs.
func (m *machine) lookAtMounts(devices, facts map[string]string, patience time.Duration, problem func(string, ...any)) error {
	mounts, err := filesystem.Mounts()
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		at, below := strings.CutPrefix(mount.Path, m.Dir+"/")
		if !below || mount.Path == m.pool {
			continue
		}
		of := filepath.Base(mount.Source)
		if mount.Type == "devtmpfs" {
			of = filepath.Base(mount.Root)
		}
		name := path.Base(at)
		what := map[string]string{"staging": model.FactStaged, "targets": model.FactTarget}[path.Dir(at)] + name
		if _, twice := facts[what]; twice || devices[of] != name || what == name {
			problem("%s is mounted at %s, which is of %q", mount.Source, at, devices[of])
		}
		access := model.Writable
		if mount.ReadOnly {
			access = model.ReadOnly
		} else if mount.Type != "devtmpfs" {
			if err := writable(mount.Path, patience); err != nil {
				problem("%w", err)
			}
		}
		facts[what] = string(access)
	}
	entries, err := os.ReadDir(filepath.Join(m.Dir, "targets"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, used := facts[model.FactTarget+e.Name()]; !used {
			facts[model.FactTarget+e.Name()] = empty
		}
	}
	return nil
}

// writable finds out whether a filesystem takes a write: a frozen one makes it
// wait.
func writable(dir string, limit time.Duration) error {
	done := make(chan error, 1)
	go func() {
		f, err := os.CreateTemp(dir, "probe-")
		if err == nil {
			err = errors.Join(f.Close(), os.Remove(f.Name()))
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

// lookAtWriters waits until every writer has come further, which it could not if
// its filesystem were frozen, and looks at what it has written.
func (r *run) lookAtWriters() error {
	r.mu.Lock()
	live := map[string]*writer{}
	volumes := map[string]model.Volume{}
	for name, w := range r.live {
		if w.held.Load() { // until the call for its group is repeated
			continue
		}
		live[name], volumes[name] = w, *r.world.Volumes[name]
	}
	r.mu.Unlock()
	var problems []error
	for name, w := range live {
		if err := w.Progress(r.patience); err != nil {
			problems = append(problems, fmt.Errorf("volume %s: %w", name, err))
			continue
		}
		if err := r.compareLive(name, w, volumes[name]); err != nil {
			problems = append(problems, fmt.Errorf("volume %s: %w", name, err))
		}
	}
	return errors.Join(problems...)
}

// compareLive looks at the data of a volume that has a writer.
func (r *run) compareLive(name string, w *writer, v model.Volume) error {
	w.pause.Lock()
	defer w.pause.Unlock()
	r.mu.Lock()
	target := r.site.nodes()[r.at[name]].target(name)
	r.mu.Unlock()
	found, err := read(target, v.Kind, v.Content)
	if err != nil {
		return err
	}
	if found.last != w.Safe.Load() {
		return fmt.Errorf("it ends with record %d of %d", found.last, w.Safe.Load())
	}
	r.figures.looks.Add(1)
	r.figures.looked.Add(min(found.last, slots) * recordSize)
	return nil
}
