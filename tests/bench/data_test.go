//go:build integration

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
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

// fio runs a row on a target and gives the bytes per second. What is written is
// written past the page cache.
func (r row) fio(b *testing.B, at target, more ...string) float64 {
	b.Helper()
	arguments := append([]string{
		"--name=" + r.name, "--filename=" + at.path, "--size=" + fmt.Sprint(span), "--direct=1", "--ioengine=libaio",
		"--output-format=json", "--randrepeat=0", "--norandommap=1", "--allow_mounted_write=1",
	}, r.arguments...)
	out, err := exec.Command("fio", append(arguments, more...)...).Output()
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
	job := report.Jobs[0]
	if job.Error != 0 {
		b.Fatalf("fio on %s: error %d", at.path, job.Error)
	}
	return (job.Read.Bytes + job.Write.Bytes) / max(job.Read.Runtime, job.Write.Runtime) * 1000
}

// timed is how long one turn of a row is.
func timed() []string {
	return []string{"--time_based", "--runtime=" + pick("600ms", "300ms"), "--ramp_time=100ms"}
}

// fill writes all of a target once.
func (at target) fill(b *testing.B) {
	b.Helper()
	row{"fill", []string{"--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1"}}.fio(b, at)
}

// inTurns runs rows on targets in turns, and tells for each the median of the
// ratios to each of the references, which are the first targets; so many. The order
// is another one in each turn, so that none has always the same one before it, and
// what that has left to be written is written before.
func inTurns(b *testing.B, rows []row, references int, targets ...target) {
	b.Helper()
	order := rand.New(rand.NewPCG(1, 1))
	for _, r := range rows {
		b.Run(r.name, func(b *testing.B) {
			speeds := make([][]float64, len(targets))
			for range b.N {
				for _, at := range order.Perm(len(targets)) {
					unix.Sync()
					speeds[at] = append(speeds[at], r.fio(b, targets[at], timed()...))
				}
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
			ratios := make([]float64, len(speeds[i]))
			for turn := range ratios {
				ratios[turn] = speeds[i][turn] / speeds[j][turn]
			}
			reportRatio(b, ratios, at.name+"/"+targets[j].name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// bareLoop attaches a file of the pool's own filesystem to a loop device, as the
// driver does, and nothing else: the limit of the mechanism.
func bareLoop(b *testing.B, d *harness.Driver, name string) target {
	b.Helper()
	f, err := os.Create(filepath.Join(poolDir(d), name))
	must(b, err)
	defer f.Close()
	must(b, extent.Prepare(f, 128<<10))
	must(b, f.Truncate(2*span))
	return attached(b, f, name)
}

func attached(b *testing.B, f *os.File, name string) target {
	b.Helper()
	device, err := loop.Attach(f, loop.Options{BlockSize: 4096})
	must(b, err)
	b.Cleanup(func() { must(b, first(device.Detach(context.Background()), os.Remove(f.Name()))) })
	return target{name, device.Path}
}

func plainFile(b *testing.B, d *harness.Driver) target {
	b.Helper()
	at := target{"file", filepath.Join(poolDir(d), "plain")}
	must(b, os.WriteFile(at.path, nil, 0o600))
	must(b, os.Truncate(at.path, 2*span))
	b.Cleanup(func() { os.Remove(at.path) })
	return at
}

// volume makes a volume, and gives where it is published.
func (p *population) volume(b *testing.B, name string, c *csi.VolumeCapability, change ...func(*csi.CreateVolumeRequest)) (path, id string) {
	b.Helper()
	change = append(change, func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 * span })
	id, err := p.create(name, c, change...)
	must(b, err)
	must(b, p.use(name, id, c))
	return p.Target(name), id
}

func (p *population) remove(b *testing.B, name, id string) {
	b.Helper()
	must(b, first(p.unpublish(name, id), p.unstage(name, id), p.delete(id)))
}

// BenchmarkBlockVolume sets block volumes that have been written against a bare
// loop device on a file of the same filesystem, and that file by itself. A second
// bare loop device tells how exact that is.
func BenchmarkBlockVolume(b *testing.B) {
	p := &population{Driver: harness.Start(b, harness.FilePool("16Gi"))}
	block := harness.Block(harness.Writer)
	thin, _ := p.volume(b, "thin", block)
	thick, _ := p.volume(b, "thick", block, harness.Parameters("provisioning", "thick"))
	targets := []target{plainFile(b, p.Driver), bareLoop(b, p.Driver, "loop"), bareLoop(b, p.Driver, "loop-again"), {"thin", thin}, {"thick", thick}}
	for _, at := range targets {
		at.fill(b)
	}
	inTurns(b, rows, 2, targets...)
}

// BenchmarkFilesystemVolume sets a file in a filesystem volume against a file in
// the same filesystem on a bare loop device. A second of those tells how exact that
// is.
func BenchmarkFilesystemVolume(b *testing.B) {
	for _, fs := range pick([]string{"ext4", "xfs"}, []string{"ext4"}) {
		b.Run(fs, func(b *testing.B) {
			p := &population{Driver: harness.Start(b, harness.FilePool("16Gi"))}
			byHand := func(name string) target {
				device := bareLoop(b, p.Driver, name)
				must(b, filesystem.Make(b.Context(), device.path, filesystem.Type(fs), nil))
				dir := filepath.Join(b.TempDir(), "mount")
				must(b, os.Mkdir(dir, 0o700))
				must(b, filesystem.Mount(b.Context(), device.path, dir, filesystem.Type(fs), nil, false))
				b.Cleanup(func() { must(b, unix.Unmount(dir, 0)) })
				return target{name, filepath.Join(dir, "file")}
			}
			thin, _ := p.volume(b, "thin", harness.Mount(fs, harness.Writer))
			targets := []target{byHand("loop"), byHand("loop-again"), {"thin", filepath.Join(thin, "file")}}
			for _, at := range targets {
				at.fill(b)
			}
			inTurns(b, rows, 1, targets...)
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
						speed = r.fio(b, target{"loop", device.Path})
						must(b, first(device.Detach(context.Background()), f.Close(), os.Remove(f.Name())))
					} else {
						name := p.name()
						path, id := p.volume(b, name, block, harness.Parameters("provisioning", targets[at].name))
						speed = r.fio(b, target{targets[at].name, path})
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
				randomWrite.fio(b, at, "--io_size="+fmt.Sprint(span/64))
			}
		}
		for _, r := range []row{randomWrite, randomRead} {
			b.Run(fmt.Sprintf("snapshots=%d/%s", n, r.name), func(b *testing.B) {
				speeds := make([][]float64, len(targets))
				for turn := range b.N {
					undo := cut(b)
					for i := range targets {
						at := (i + turn) % len(targets)
						speeds[at] = append(speeds[at], r.fio(b, targets[at], "--time_based", "--runtime="+pick("1", "500ms")))
					}
					undo()
				}
				tell(b, 2, targets, speeds)
			})
		}
	}
}
