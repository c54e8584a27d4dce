//go:build integration

package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// world is a driver with a volume in use, and a copy of it.
type world struct {
	t      *testing.T
	server *harness.Driver
	client *driver
	volume string
	file   string
}

func newWorld(t *testing.T, size int64, c *csi.VolumeCapability) (w *world, target string) {
	t.Helper()
	server := harness.Start(t, harness.FilePool("4Gi"))
	client, err := connect("unix://"+server.Socket, "")
	must(t, err)
	t.Cleanup(client.close)
	volume := server.Create("volume", size, c).GetVolumeId()
	return &world{t, server, client, volume, filepath.Join(server.Dir, "copy")}, server.Use("volume", volume, c)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// save saves and verifies, which fails if a byte differs.
func (w *world) save() report {
	w.t.Helper()
	r, err := save(w.server.Context(), w.client, w.volume, w.file, true)
	must(w.t, err)
	if !r.verified {
		w.t.Error("not verified")
	}
	snapshots, err := w.server.ListSnapshots(w.server.Context(), &csi.ListSnapshotsRequest{})
	must(w.t, err)
	volumes, err := w.server.ListVolumes(w.server.Context(), &csi.ListVolumesRequest{})
	must(w.t, err)
	if s, v := len(snapshots.GetEntries()), len(volumes.GetEntries()); s != 1 || v != 1 {
		w.t.Errorf("it leaves %d snapshots and %d volumes", s, v)
	}
	return r
}

func write(t *testing.T, name string, off int64, n int) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	defer f.Close()
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	_, err = f.WriteAt(data, off)
	must(t, err)
	must(t, f.Sync())
}

// A copy is brought up to date by what was written since, and is equal.
func TestACopyOfABlockVolumeIsBroughtUpToDate(t *testing.T) {
	const size = 64 << 20
	w, device := newWorld(t, size, harness.Block(harness.Writer))
	write(t, device, 1<<20, 8<<20)
	if r := w.save(); !r.full || r.copied != 8<<20 || r.capacity != size {
		t.Errorf("the first time: %+v", r)
	}
	if r := w.save(); r.full || r.copied != 0 {
		t.Errorf("nothing was written: %+v", r)
	}
	for range 5 {
		before := rand.Int64N(size/4096) * 4096
		write(t, device, before, 4096)
		if r := w.save(); r.full || r.copied != 4096 || r.ranges != 1 {
			t.Errorf("a block was written: %+v", r)
		}
	}
	// What was given back is a hole in the copy, too.
	if out, err := exec.Command("blkdiscard", "--offset", "1048576", "--length", "8388608", device).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w.save()
	if out, err := exec.Command("cmp", device, w.file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	w.server.Release("volume", w.volume)
	id, err := restore(w.server.Context(), w.client, w.file, "restored", "")
	must(t, err)
	restored := w.server.Use("restored", id, harness.Block(harness.Writer))
	if out, err := exec.Command("cmp", restored, w.file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	w.server.Release("restored", id)
}

func TestACopyOfAFilesystemInUseIsBroughtUpToDateAndRestored(t *testing.T) {
	for fs, size := range map[string]int64{"ext4": 64 << 20, "xfs": 320 << 20} {
		t.Run(fs, func(t *testing.T) {
			w, dir := newWorld(t, size, harness.Mount(fs, harness.Writer))
			for round := range 4 {
				for i := range 5 {
					write(t, filepath.Join(dir, fmt.Sprintf("file-%d", rand.IntN(8))), rand.Int64N(1<<20), 1+rand.IntN(100_000))
					_ = os.Remove(filepath.Join(dir, fmt.Sprintf("file-%d", i)))
				}
				if r := w.save(); r.full != (round == 0) || r.copied == 0 || r.copied > size/2 {
					t.Errorf("round %d: %+v", round, r)
				}
			}
			w.server.Release("volume", w.volume)
			w.save() // cleanly unmounted
			want := tree(t, w.server.Use("volume", w.volume, harness.Mount(fs, harness.Writer)))
			id, err := restore(w.server.Context(), w.client, w.file, "restored", fs)
			must(t, err)
			if got := tree(t, w.server.Use("restored", id, harness.Mount(fs, harness.Writer))); got != want || got == "" {
				t.Errorf("restored:\n%s\nwant\n%s", got, want)
			}
			w.server.Release("restored", id)
			w.server.Release("volume", w.volume)
		})
	}
}

// tree tells the checksums of all files of a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	command := exec.Command("sh", "-c", "find . -type f -exec sha256sum {} + | sort")
	command.Dir = dir
	out, err := command.CombinedOutput()
	must(t, err)
	return string(out)
}

// A save that is interrupted at any instant is finished by the next, whatever
// was written or given back in between.
func TestASaveThatIsInterruptedIsFinishedByTheNext(t *testing.T) {
	const size = 64 << 20
	w, device := newWorld(t, size, harness.Block(harness.Writer))
	write(t, device, 0, 4<<20)
	w.save()
	began := 0
	for range 6 {
		for range 10 {
			off := rand.Int64N(size/(1<<20)) << 20
			if rand.IntN(2) == 0 {
				write(t, device, off, 1<<20)
			} else if out, err := exec.Command("blkdiscard", "--offset", fmt.Sprint(off), "--length", "1048576", device).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
		ctx, cancel := context.WithTimeout(w.server.Context(), time.Duration(rand.IntN(400))*time.Millisecond)
		_, err := save(ctx, w.client, w.volume, w.file, false)
		cancel()
		if s, _ := readState(w.file); err != nil && !s.Begun.IsZero() {
			began++
			if _, err := restore(w.server.Context(), w.client, w.file, "torn", ""); err == nil {
				t.Error("a copy that is not whole was restored")
			}
		}
		if rand.IntN(3) == 0 {
			w.server.Kill()
			w.server.Start()
			w.client.close()
			w.client, err = connect("unix://"+w.server.Socket, "")
			must(t, err)
		}
		if rand.IntN(2) == 0 {
			w.save() // finishes it
			w.save() // is of now
		}
	}
	w.save()
	w.save()
	if out, err := exec.Command("cmp", device, w.file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%d of 6 were interrupted after they had begun to copy", began)
	w.server.Release("volume", w.volume)
}

// Where the changes cannot be told, everything is copied: the snapshot of the
// last time is gone, or the one that was being copied is.
func TestWithoutItsSnapshotACopyIsMadeAnew(t *testing.T) {
	const size = 16 << 20
	w, device := newWorld(t, size, harness.Block(harness.Writer))
	write(t, device, 0, 1<<20)
	w.save()
	s, err := readState(w.file)
	must(t, err)
	must(t, w.client.deleteSnapshot(w.server.Context(), s.Snapshot))
	write(t, device, 2<<20, 1<<20)
	if r := w.save(); !r.full || r.copied != 2<<20 {
		t.Errorf("the base is gone: %+v", r)
	}

	// A save has begun to write what is then lost.
	s, err = readState(w.file)
	must(t, err)
	s.Pending, s.Begun = "lost", time.Now()
	must(t, s.write(w.file))
	write(t, w.file, 8<<20, 4096)
	if r := w.save(); !r.full {
		t.Errorf("the pending one is gone: %+v", r)
	}
	if _, err := save(w.server.Context(), w.client, "another/volume/id", w.file, false); err == nil || !strings.Contains(err.Error(), w.volume) {
		t.Errorf("another volume: %v", err)
	}
	must(t, os.Remove(stateFile(w.file)))
	if _, err := save(w.server.Context(), w.client, w.volume, w.file, false); err == nil {
		t.Error("a file that is no copy was written over")
	}
	w.server.Release("volume", w.volume)
}

func TestHelpTeaches(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"save", "--help"}, {"restore", "--help"}} {
		var out bytes.Buffer
		c := newCommand()
		c.SetArgs(args)
		c.SetOut(&out)
		must(t, c.Execute())
		if !strings.Contains(out.String(), "endpoint") {
			t.Errorf("%v: %s", args, out.String())
		}
	}
	c := newCommand()
	c.SetArgs([]string{"save", "--to", "x"})
	if err := c.Execute(); err == nil || !strings.Contains(err.Error(), "volume") {
		t.Errorf("without --volume: %v", err)
	}
}
