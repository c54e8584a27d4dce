//go:build integration

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

// row is one way of using a device or a file, as fio has it.
type row struct {
	name      string
	arguments []string
}

var (
	randomWrite = row{"4k-randwrite-qd16", []string{"--rw=randwrite", "--bs=4k", "--iodepth=16"}}
	randomRead  = row{"4k-randread-qd16", []string{"--rw=randread", "--bs=4k", "--iodepth=16"}}
	rows        = []row{
		{"4k-randread-qd1", []string{"--rw=randread", "--bs=4k", "--iodepth=1"}},
		randomRead,
		{"4k-randwrite-qd1", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1"}},
		randomWrite,
		{"1M-read", []string{"--rw=read", "--bs=1M", "--iodepth=4"}},
		{"1M-write", []string{"--rw=write", "--bs=1M", "--iodepth=4"}},
		{"4k-write-fsync", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"}},
		{"4k-mixed-qd16", []string{"--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=16"}},
	}
)

// span is how large what is written and read is, in bytes.
var span = pick[int64](1<<30, 256<<20)

// target is a device or a file that is measured.
type target struct{ name, path string }

// fio runs a row on targets, one after the other, and gives the bytes per second
// of each. What is written is written past the page cache.
func (r row) fio(b testing.TB, on []target, more ...string) []float64 {
	b.Helper()
	arguments := slices.Concat([]string{
		"--size=" + fmt.Sprint(span), "--direct=1", "--ioengine=libaio", "--thread", "--stonewall",
		"--output-format=json", "--randrepeat=0", "--norandommap=1", "--allow_mounted_write=1",
	}, r.arguments, more)
	for _, at := range on {
		arguments = append(arguments, "--name="+at.name, "--filename="+at.path)
	}
	out, err := exec.Command("fio", arguments...).Output()
	must(b, err)
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write struct {
				Bytes   float64 `json:"io_bytes"`
				Runtime float64 // milliseconds
			}
		}
	}
	must(b, json.Unmarshal(out[bytes.IndexByte(out, '{'):], &report))
	if len(report.Jobs) != len(on) {
		b.Fatalf("fio tells of %d targets of %d", len(report.Jobs), len(on))
	}
	var speeds []float64
	for i, job := range report.Jobs {
		if job.Error != 0 {
			b.Fatalf("fio on %s: error %d", on[i].path, job.Error)
		}
		speeds = append(speeds, (job.Read.Bytes+job.Write.Bytes)/max(job.Read.Runtime, job.Write.Runtime)*1000)
	}
	return speeds
}

// fill writes all of a target once.
func (at target) fill(b testing.TB) {
	b.Helper()
	row{"fill", []string{"--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1"}}.fio(b, []target{at})
}

// Two bare loop devices may differ by some percent over a whole run, and single
// turns by more. So there are new targets after a few turns, and there are more
// turns, up to some limit, until the medians are known well enough.
const (
	turnsOfTargets = 7
	moreTurns      = 5    // times as many as were asked for
	exact          = 0.01 // standard error of the median of ratios
)

// inTurns runs rows on targets in turns, and tells for each the median of the
// ratios to each of the references, which are the first targets; so many. The order
// is another one in each turn, so that none has always the same one before it.
func inTurns(b *testing.B, rows []row, references int, open func(testing.TB) []target) {
	b.Helper()
	order := rand.New(rand.NewPCG(1, 1))
	for _, r := range rows {
		b.Run(r.name, func(b *testing.B) {
			var speeds [][]float64 // of each target, in each turn
			var targets []target
			for turns := 0; turns < b.N || turns < moreTurns*b.N && !quick && inexact(speeds, references); {
				s := newScope(b)
				targets = open(s)
				if speeds == nil {
					speeds = make([][]float64, len(targets))
				}
				var on []target
				var at []int
				for range min(turnsOfTargets, b.N) {
					for _, i := range order.Perm(len(targets)) {
						at, on = append(at, i), append(on, targets[i])
					}
				}
				for i, speed := range r.fio(b, on, "--time_based", "--runtime=200ms", "--ramp_time=50ms") {
					speeds[at[i]] = append(speeds[at[i]], speed)
				}
				turns = len(speeds[0])
				s.end()
			}
			tell(b, references, targets, speeds)
		})
	}
}
func tell(b *testing.B, references int, targets []target, speeds [][]float64) {
	b.Helper()
	for i, at := range targets {
		b.ReportMetric(quantile(speeds[i], 0.5)/1e6, at.name+"-MB/s")
		for j := range min(i, references) {
			reportRatio(b, ratios(speeds[i], speeds[j]), at.name+"/"+targets[j].name)
		}
	}
	b.ReportMetric(float64(len(speeds[0])), "turns")
	b.ReportMetric(0, "ns/op")
}

// ratios are those of two speeds in each turn.
func ratios(of, to []float64) []float64 {
	all := make([]float64, len(of))
	for turn := range all {
		all[turn] = of[turn] / to[turn]
	}
	return all
}

// inexact is whether a median that tell would tell is not known well enough. The
// standard error of a median of n is 1.25 of that of their mean, which is 0.74 of
// the distance of the quartiles by the root of n, if they are spread normally.
func inexact(speeds [][]float64, references int) bool {
	for i := range speeds {
		for j := range min(i, references) {
			all := ratios(speeds[i], speeds[j])
			if 1.25*0.74*(quantile(all, 0.75)-quantile(all, 0.25))/math.Sqrt(float64(len(all))) > exact {
				return true
			}
		}
	}
	return false
}

// bareLoop attaches a file of the pool's own filesystem to a loop device, as the
// driver does, and nothing else: the limit of the mechanism.
func bareLoop(b testing.TB, d *harness.Driver, name string) target {
	b.Helper()
	f, err := os.Create(filepath.Join(poolDir(d), name))
	must(b, err)
	defer f.Close()
	must(b, extent.Prepare(f, 128<<10))
	must(b, f.Truncate(2*span))
	return attached(b, f, name)
}

func attached(b testing.TB, f *os.File, name string) target {
	b.Helper()
	device, err := loop.Attach(f, loop.Options{BlockSize: 4096})
	must(b, err)
	b.Cleanup(func() { must(b, first(device.Detach(context.Background()), os.Remove(f.Name()))) })
	return target{name, device.Path}
}

func plainFile(b testing.TB, d *harness.Driver) target {
	b.Helper()
	at := target{"file", filepath.Join(poolDir(d), "plain")}
	must(b, os.WriteFile(at.path, nil, 0o600))
	must(b, os.Truncate(at.path, 2*span))
	b.Cleanup(func() { os.Remove(at.path) })
	return at
}

// volume makes a volume, and gives where it is published.
func (p *population) volume(b testing.TB, name string, c *csi.VolumeCapability, change ...func(*csi.CreateVolumeRequest)) (path, id string) {
	b.Helper()
	change = append(change, func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 * span })
	id, err := p.create(name, c, change...)
	must(b, err)
	must(b, p.use(name, id, c))
	return p.Target(name), id
}

func (p *population) remove(b testing.TB, name, id string) {
	b.Helper()
	must(b, first(p.unpublish(name, id), p.unstage(name, id), p.delete(id)))
}

// scope is a benchmark for what is to be cleaned up before it ends.
type scope struct {
	testing.TB
	undo []func()
}

func newScope(b testing.TB) *scope {
	s := &scope{TB: b}
	b.Cleanup(s.end)
	return s
}

// Cleanup is for what b.Cleanup is for.
func (s *scope) Cleanup(undo func()) { s.undo = append(s.undo, undo) }

func (s *scope) end() {
	for len(s.undo) > 0 {
		last := len(s.undo) - 1
		undo := s.undo[last]
		s.undo = s.undo[:last]
		undo()
	}
}

// published makes a volume, and gives the target that it is; file is the part
// below where it is published.
func (p *population) published(b testing.TB, name string, c *csi.VolumeCapability, file string, change ...func(*csi.CreateVolumeRequest)) target {
	b.Helper()
	volume := p.name()
	path, id := p.volume(b, volume, c, change...)
	b.Cleanup(func() { p.remove(b, volume, id) })
	return target{name, filepath.Join(path, file)}
}

func filled(b testing.TB, targets ...target) []target {
	b.Helper()
	for _, at := range targets {
		at.fill(b)
	}
	return targets
}

// BenchmarkBlockVolume sets block volumes that have been written against a bare
// loop device on a file of the same filesystem, and that file by itself. A second
// bare loop device tells how exact that is.
func BenchmarkBlockVolume(b *testing.B) {
	p := &population{Driver: harness.Start(b, harness.FilePool("16Gi"))}
	block := harness.Block(harness.Writer)
	inTurns(b, rows, 2, func(b testing.TB) []target {
		b.Helper()
		return filled(b,
			plainFile(b, p.Driver), bareLoop(b, p.Driver, "loop"), bareLoop(b, p.Driver, "loop-again"),
			p.published(b, "thin", block, ""), p.published(b, "thick", block, "", harness.Parameters("provisioning", "thick")))
	})
}

// BenchmarkFilesystemVolume sets a file in a filesystem volume against a file in
// the same filesystem on a bare loop device. A second of those tells how exact that
// is.
func BenchmarkFilesystemVolume(b *testing.B) {
	for _, fs := range pick([]string{"ext4", "xfs"}, []string{"ext4"}) {
		b.Run(fs, func(b *testing.B) {
			p := &population{Driver: harness.Start(b, harness.FilePool("16Gi"))}
			byHand := func(b testing.TB, name string) target {
				b.Helper()
				device := bareLoop(b, p.Driver, name)
				must(b, filesystem.Make(b.Context(), device.path, filesystem.Type(fs), nil))
				dir := filepath.Join(b.TempDir(), "mount")
				must(b, os.Mkdir(dir, 0o700))
				must(b, filesystem.Mount(b.Context(), device.path, dir, filesystem.Type(fs), nil, false))
				b.Cleanup(func() { must(b, unix.Unmount(dir, 0)) })
				return target{name, filepath.Join(dir, "file")}
			}
			inTurns(b, rows, 1, func(b testing.TB) []target {
				b.Helper()
				return filled(b, byHand(b, "loop"), byHand(b, "loop-again"), p.published(b, "thin", harness.Mount(fs, harness.Writer), "file"))
			})
		})
	}
}

// BenchmarkFirstWrite sets the first write of all of a volume against that of a
// bare loop device on a new file, at random and from the beginning to the end.
func BenchmarkFirstWrite(b *testing.B) {
	p := &population{Driver: harness.Start(b, harness.FilePool("16Gi"))}
	block := harness.Block(harness.Writer)
	for _, r := range []row{
		{"4k-randwrite-qd16", []string{"--rw=randwrite", "--bs=4k", "--iodepth=16", "--io_size=" + fmt.Sprint(span/8)}},
		{"1M-write", []string{"--rw=write", "--bs=1M", "--iodepth=4"}},
	} {
		b.Run(r.name, func(b *testing.B) {
			targets := []target{{name: "loop"}, {name: "thin"}, {name: "thick"}}
			speeds := make([][]float64, len(targets))
			for turn := range b.N {
				for i := range targets {
					at := (i + turn) % len(targets)
					var speed float64
					if at == 0 {
						f, err := os.Create(filepath.Join(poolDir(p.Driver), "new"))
						must(b, err)
						must(b, extent.Prepare(f, 128<<10))
						must(b, f.Truncate(2*span))
						device, err := loop.Attach(f, loop.Options{BlockSize: 4096})
						must(b, err)
						speed = r.fio(b, []target{{"loop", device.Path}})[0]
						must(b, first(device.Detach(context.Background()), f.Close(), os.Remove(f.Name())))
					} else {
						name := p.name()
						path, id := p.volume(b, name, block, harness.Parameters("provisioning", targets[at].name))
						speed = r.fio(b, []target{{targets[at].name, path}})[0]
						p.remove(b, name, id)
					}
					speeds[at] = append(speeds[at], speed)
				}
			}
			tell(b, 1, targets, speeds)
		})
	}
}

// BenchmarkAfterSnapshots sets a block volume of which there are snapshots, just
// cut, against one of which there is none, and against a bare loop device on a
// file that was reflinked as often: what sharing blocks costs.
func BenchmarkAfterSnapshots(b *testing.B) {
	p := &population{Driver: harness.Start(b, harness.FilePool("40Gi"))}
	block := harness.Block(harness.Writer)
	fresh, _ := p.volume(b, "fresh", block)
	shared, id := p.volume(b, "shared", block)
	device := bareLoop(b, p.Driver, "loop")
	image, err := os.Open(filepath.Join(poolDir(p.Driver), "loop"))
	must(b, err)
	defer image.Close()
	targets := []target{{"fresh", fresh}, {"reflinked", device.path}, {"snapshotted", shared}}
	for _, at := range targets {
		at.fill(b)
	}
	made := 0
	cut := func(b *testing.B) (undo func()) { // one of each
		b.Helper()
		made++
		snapshot := p.Snapshot(p.name(), id).GetSnapshotId()
		clone, err := os.Create(filepath.Join(poolDir(p.Driver), fmt.Sprintf("reflink-%d", made)))
		must(b, err)
		must(b, extent.Clone(clone, image))
		return func() {
			_, err := p.DeleteSnapshot(context.Background(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
			must(b, first(err, os.Remove(clone.Name()), clone.Close()))
		}
	}
	for _, n := range []int{1, 10} {
		for range n - 1 { // between two snapshots something is written
			defer cut(b)()
			for _, at := range targets[1:] {
				randomWrite.fio(b, []target{at}, "--io_size="+fmt.Sprint(span/64))
			}
		}
		for _, r := range []row{randomWrite, randomRead} {
			b.Run(fmt.Sprintf("snapshots=%d/%s", n, r.name), func(b *testing.B) {
				speeds := make([][]float64, len(targets))
				for turn := range b.N {
					undo := cut(b)
					for i := range targets {
						at := (i + turn) % len(targets)
						speeds[at] = append(speeds[at], r.fio(b, targets[at:at+1], "--time_based", "--runtime="+pick("1", "500ms"))...)
					}
					undo()
				}
				tell(b, 2, targets, speeds)
			})
		}
	}
}
