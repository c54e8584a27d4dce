//go:build integration

package crash

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
)

// What the test of the crashes must see is planted by hand. Each plants one
// fault and takes it away again; want is a word of what must be said of it.
var faults = []struct {
	name, want string
	plant      func(w *world) (remove func())
}{
	{"a volume that nobody knows of", "volumes/ghost is an orphan", func(w *world) func() {
		return w.plantImage("volumes/ghost", "volume.json", `{"payload": {}}`)
	}},
	{"a snapshot that nobody knows of", "snapshots/ghost is an orphan", func(w *world) func() {
		return w.plantImage("snapshots/ghost", "snapshot.json", `{"payload": {}}`)
	}},
	{"what was being made", "not removed", func(w *world) func() {
		return w.plantImage(".staging/volumes-ghost", "volume.json", `{"payload": {}}`)
	}},
	{"what was being freed", "not removed", func(w *world) func() {
		return w.plantImage(".trash/ghost.abcdefgh", "volume.json", `{"payload": {}}`)
	}},
	{"bytes that the driver has not promised", "too many", func(w *world) func() {
		data := filepath.Join(w.pool, "volumes/bystander/data")
		w.must(os.Truncate(data, 64*mib+4096))
		return func() { w.must(os.Truncate(data, 64*mib)) }
	}},
	{"a loop device", "device of state/mounts/default/volumes/bystander/data", func(w *world) func() {
		device := w.plantDevice()
		return func() { w.must(device.Detach(w.t.Context())) }
	}},
	{"a loop device that vanishes with its last user", "will vanish", func(w *world) func() {
		device := w.plantDevice()
		user, err := os.Open(device.Path)
		w.must(err)
		marker, err := os.Open(device.Path)
		w.must(err)
		w.must(unix.IoctlSetInt(int(marker.Fd()), unix.LOOP_CLR_FD, 0))
		w.must(marker.Close())
		return func() { w.must(user.Close()) }
	}},
	{"a mount", "mount targets/ghost", func(w *world) func() {
		target := w.Target("ghost")
		w.must(os.Mkdir(target, 0o700))
		w.must(filesystem.Bind(w.Target("bystander"), target, true))
		return func() {
			w.must(filesystem.Unmount(w.t.Context(), target))
			w.must(os.Remove(target))
		}
	}},
	{"a target path", "path targets/ghost", func(w *world) func() {
		w.must(os.Mkdir(w.Target("ghost"), 0o700))
		return func() { w.must(os.Remove(w.Target("ghost"))) }
	}},
	{"a frozen filesystem", "frozen", func(w *world) func() {
		freeze(w, w.Staging("bystander"))
		return func() {
			_, err := filesystem.Thaw(w.Staging("bystander"))
			w.must(err)
		}
	}},
	{"a writer that is held up", "the writer hangs", func(w *world) func() {
		freeze(w, w.Staging("bystander"))
		return func() {
			_, err := filesystem.Thaw(w.Staging("bystander"))
			w.must(err)
		}
	}},
	{"other data", "has not the data", func(w *world) func() {
		good, err := os.ReadFile(w.file("bystander"))
		w.must(err)
		bad := slices.Clone(good)
		bad[len(bad)/2] ^= 1
		w.must(os.WriteFile(w.file("bystander"), bad, 0o600))
		return func() { w.must(os.WriteFile(w.file("bystander"), good, 0o600)) }
	}},
}

func (w *world) plantImage(dir, name, text string) func() {
	w.t.Helper()
	dir = filepath.Join(w.pool, dir)
	w.must(os.Mkdir(dir, 0o700))
	w.must(os.WriteFile(filepath.Join(dir, "data"), nil, 0o600))
	w.must(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	return func() {
		for _, file := range []string{"data", name, "."} {
			w.must(os.Remove(filepath.Join(dir, file)))
		}
	}
}

func (w *world) plantDevice() loop.Device {
	w.t.Helper()
	data, err := os.Open(filepath.Join(w.pool, "volumes/bystander/data"))
	w.must(err)
	defer data.Close()
	device, err := loop.Attach(data, loop.Options{ReadOnly: true})
	w.must(err)
	return device
}

func TestEveryKindOfFaultIsSeen(t *testing.T) {
	w := newWorld(t, false)
	base := w.look()
	w.compare("before", base, base.lines)
	for _, fault := range faults {
		w.at = fault.name
		remove := fault.plant(w)
		w.patience = 100 * time.Millisecond
		got := w.look()
		w.patience = defaultPatience
		remove()
		said := slices.Concat(got.problems, differ(got.lines, base.lines))
		if !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, fault.want) }) {
			t.Errorf("%s is not seen; said: %q", fault.name, said)
		}
		w.live["bystander"].Longest.Store(0)
		w.compare("after the fault was removed", w.look(), base.lines)
	}
}

func TestAWritersFileWithAHoleInItIsSeen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "writer")
	const last = slots + 10
	file := make([]byte, slots*recordSize)
	for n := int64(1); n <= last; n++ {
		fill(file[n%slots*recordSize:][:recordSize], n)
	}
	for _, c := range []struct {
		name  string
		spoil func([]byte)
		want  string
	}{
		{"whole", func([]byte) {}, ""},
		{"a record is missing", func(b []byte) { fill(b[5*recordSize:][:recordSize], 5) }, "missing"},
		{"a record is torn", func(b []byte) { b[7*recordSize+100] ^= 1 }, "torn"},
		{"a record is zeros", func(b []byte) { clear(b[20*recordSize:][:recordSize]) }, "missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spoiled := slices.Clone(file)
			c.spoil(spoiled)
			if err := os.WriteFile(name, spoiled, 0o600); err != nil {
				t.Fatal(err)
			}
			n, err := records(name, 0)
			switch {
			case c.want == "" && (err != nil || n != last):
				t.Errorf("got %d, %v, want %d", n, err, last)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want an error that says %q", err, c.want)
			}
		})
	}
}

// The kill comes when the changes before are made, and the n-th is not.
func TestTheDriverIsKilledExactlyAtAPoint(t *testing.T) {
	w := newWorld(t, true)
	o := operation{name: "CreateVolume", call: create(64*mib, ext4)}
	undo := func() {
		goneV(w)
		w.must(w.settle(func() bool { return false })) // or it would be among the next changes
	}
	changes := w.try(o, point{}, false).changes
	undo()
	rename := 1 + slices.Index(changes, "rename volumes-v to v")
	if rename == 0 {
		t.Fatalf("there is no rename to kill at: %q", changes)
	}
	for n, made := range map[int]bool{rename: false, rename + 1: true} {
		tr := w.try(o, point{n: n}, true)
		if !tr.killed.Load() || len(tr.changes) != n || !slices.Equal(tr.changes, changes[:n]) {
			t.Errorf("killed %t after %q, want the first %d of %q", tr.killed.Load(), tr.changes, n, changes)
		}
		for dir, want := range map[string]bool{".staging/volumes-v": !made, "volumes/v": made} {
			if _, err := os.Stat(filepath.Join(w.pool, dir)); (err == nil) != want {
				t.Errorf("killed at change %d of %q, %s: %v", n, changes, dir, err)
			}
		}
		w.Start()
		undo()
	}
}
