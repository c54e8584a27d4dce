//go:build integration

// Package integration tests the whole driver over its socket, on the real
// kernel: what the specification's own suite does not cover. The names of the
// tests state the rules.
package integration

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) {
	if arguments := os.Getenv(groupCounterVariable); arguments != "" {
		fmt.Fprintln(os.Stderr, groupRunCounter(arguments))
		os.Exit(1)
	}
	harness.Main(m)
}

const (
	ctlMiB = int64(1) << 20
	ctlGiB = int64(1) << 30
)

// ctlTwoPools is the configuration of two file pools, the first of which is the
// default one.
const ctlTwoPools = `pools:
- name: default
  source:
    file: {path: $DIR/default.img, size: 2Gi, sparse: true}
- name: other
  source:
    file: {path: $DIR/other.img, size: 1Gi, sparse: true}
`

// ctlMust fails the test if a call did.
func ctlMust(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ctlWant fails the test unless a call ended with that code, and with a message
// of one line that has all the words.
func ctlWant(t *testing.T, rule string, err error, code codes.Code, words ...string) {
	t.Helper()
	got := status.Convert(err)
	if got.Code() != code {
		t.Errorf("%s: %s (%s); want %s", rule, got.Code(), got.Message(), code)
		return
	}
	if code == codes.OK {
		return
	}
	if got.Message() == "" || strings.Contains(got.Message(), "\n") {
		t.Errorf("%s: the message is not one line: %q", rule, got.Message())
	}
	for _, word := range words {
		if !strings.Contains(got.Message(), word) {
			t.Errorf("%s: %q does not say %q", rule, got.Message(), word)
		}
	}
}

// ctlFilePool is the directory of a file pool of that name.
func ctlFilePool(d *harness.Driver, name string) string {
	return filepath.Join(d.Dir, "state", "mounts", name)
}

// ctlEmptied waits until the background work on a pool has ended: what is in
// .staging and .trash is gone.
func ctlEmptied(t *testing.T, pool string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for _, dir := range []string{".staging", ".trash"} {
		for {
			entries, err := os.ReadDir(filepath.Join(pool, dir))
			ctlMust(t, err)
			if len(entries) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s of %s still has %s", dir, pool, entries[0].Name())
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// ctlTree describes every file below a directory: its mode, its size, when it
// was written, and what is in it unless it is large. Of a directory only what
// is in it counts. Some it leaves out.
func ctlTree(t *testing.T, dir string, but ...string) string {
	t.Helper()
	var b strings.Builder
	ctlMust(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(but, path) {
			return fs.SkipDir
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s", strings.TrimPrefix(path, dir), info.Mode())
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		case info.Mode().IsRegular():
			fmt.Fprintf(&b, " %d %s", info.Size(), info.ModTime())
			if info.Size() <= 64<<10 {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(&b, " %x", sha256.Sum256(data))
			}
		}
		b.WriteByte('\n')
		return nil
	}))
	return b.String()
}

// ctlState describes all that a call which is refused must leave as it was:
// what the driver lists, the room that it tells, and the files of its pools.
func ctlState(t *testing.T, d *harness.Driver, pools ...string) string {
	t.Helper()
	var b strings.Builder
	volumes, err := d.ListVolumes(d.Context(), &csi.ListVolumesRequest{})
	ctlMust(t, err)
	for _, e := range volumes.GetEntries() {
		fmt.Fprintf(&b, "volume %s of %d bytes from %v\n", e.GetVolume().GetVolumeId(), e.GetVolume().GetCapacityBytes(), e.GetVolume().GetContentSource())
	}
	snapshots, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{})
	ctlMust(t, err)
	for _, e := range snapshots.GetEntries() {
		s := e.GetSnapshot()
		fmt.Fprintf(&b, "snapshot %s of %s, %d bytes, at %s\n", s.GetSnapshotId(), s.GetSourceVolumeId(), s.GetSizeBytes(), s.GetCreationTime().AsTime())
	}
	for _, pool := range pools {
		ctlEmptied(t, ctlFilePool(d, pool))
		fmt.Fprintf(&b, "%d bytes are left\n", ctlRoom(t, d, pool))
		b.WriteString(ctlTree(t, ctlFilePool(d, pool)))
	}
	return b.String()
}

// ctlSame fails the test if the two states differ, and tells how.
func ctlSame(t *testing.T, rule, before, after string) {
	t.Helper()
	if before == after {
		return
	}
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range old {
		if !slices.Contains(now, line) {
			t.Errorf("%s: was %s", rule, line)
		}
	}
	for _, line := range now {
		if !slices.Contains(old, line) {
			t.Errorf("%s: now %s", rule, line)
		}
	}
}

// ctlRoom asks for the capacity of a pool, with more parameters as key, value.
func ctlRoom(t *testing.T, d *harness.Driver, pool string, more ...string) int64 {
	t.Helper()
	parameters := map[string]string{"pool": pool}
	for i := 0; i+1 < len(more); i += 2 {
		parameters[more[i]] = more[i+1]
	}
	got, err := d.GetCapacity(d.Context(), &csi.GetCapacityRequest{Parameters: parameters})
	ctlMust(t, err)
	if got.GetMaximumVolumeSize().GetValue() != got.GetAvailableCapacity() {
		t.Errorf("the largest volume has %d bytes, the capacity is %d", got.GetMaximumVolumeSize().GetValue(), got.GetAvailableCapacity())
	}
	return got.GetAvailableCapacity()
}

// ctlRoomSoon waits until a pool has exactly that much room: what was deleted is
// freed in the background.
func ctlRoomSoon(t *testing.T, d *harness.Driver, pool string, want int64) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		got := ctlRoom(t, d, pool)
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Errorf("pool %s has room for %d bytes, want %d", pool, got, want)
			return
		}
	}
}

// ctlIDs lists the IDs of all volumes.
func ctlIDs(t *testing.T, d *harness.Driver) []string {
	t.Helper()
	all, err := d.ListVolumes(d.Context(), &csi.ListVolumesRequest{})
	ctlMust(t, err)
	if all.GetNextToken() != "" {
		t.Errorf("a list without limit has a token")
	}
	var ids []string
	for _, e := range all.GetEntries() {
		ids = append(ids, e.GetVolume().GetVolumeId())
	}
	return ids
}

// ctlName is the last part of an ID.
func ctlName(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// ctlFrozen freezes the filesystem that is mounted at a path, so that whatever
// the driver writes there waits until thaw. That makes an operation take as
// long as a test needs.
func ctlFrozen(t *testing.T, mountPoint string) (thaw func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	undo, err := filesystem.Freeze(ctx, mountPoint)
	ctlMust(t, err)
	thaw = func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(thaw) // before the driver is waited for
	return thaw
}

// ctlLoop attaches a file to a loop device, until the test ends.
func ctlLoop(t *testing.T, file string) string {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	ctlMust(t, err)
	defer f.Close()
	device, err := loop.Attach(f, loop.Options{})
	ctlMust(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := device.Detach(ctx); err != nil && !errors.Is(err, loop.ErrDetached) {
			t.Errorf("detaching %s: %v", device.Path, err)
		}
	})
	return device.Path
}

// ctlExt4 mounts a new ext4, which cannot share blocks, at a directory below
// the test's own.
func ctlExt4(t *testing.T, size int64) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	ctlMust(t, err)
	image, point := filepath.Join(dir, "ext4.img"), filepath.Join(dir, "ext4")
	ctlMust(t, os.WriteFile(image, nil, 0o600))
	ctlMust(t, os.Truncate(image, size))
	ctlMust(t, os.Mkdir(point, 0o700))
	device := ctlLoop(t, image)
	t.Cleanup(func() { harness.Clean(t, dir) }) // before the device is detached
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctlMust(t, filesystem.Make(ctx, device, filesystem.Ext4, nil))
	ctlMust(t, filesystem.Mount(ctx, device, point, filesystem.Ext4, nil, false))
	pool := filepath.Join(point, "pool")
	ctlMust(t, os.Mkdir(pool, 0o700))
	return pool
}

// ctlBlocks tells the bytes in blocks of a file.
func ctlBlocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	ctlMust(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

// ctlServesMetrics gives a driver that is not started yet a free port for its
// metrics, and the metrics' address.
func ctlServesMetrics(t *testing.T, d *harness.Driver) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ctlMust(t, err)
	address = l.Addr().String()
	ctlMust(t, l.Close())
	d.Args = append(d.Args, "--metrics-address", address)
	return address
}

// ctlGet gets a page of the metrics' address.
func ctlGet(t *testing.T, address, page string, code int) string {
	t.Helper()
	response, err := http.Get("http://" + address + page)
	ctlMust(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	ctlMust(t, err)
	if response.StatusCode != code {
		t.Errorf("%s: %s; want %d", page, response.Status, code)
	}
	return string(body)
}

// ctlMetrics reads the metrics, by name and labels.
func ctlMetrics(t *testing.T, address string) map[string]float64 {
	t.Helper()
	values := map[string]float64{}
	for line := range strings.Lines(ctlGet(t, address, "/metrics", http.StatusOK)) {
		line = strings.TrimSpace(line)
		end := strings.LastIndexByte(line, ' ') + 1
		if value, err := strconv.ParseFloat(line[end:], 64); err == nil && !strings.HasPrefix(line, "#") {
			values[line[:end-1]] = value
		}
	}
	return values
}
