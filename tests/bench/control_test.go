//go:build integration

// Package bench measures the driver as its users meet it: the real process over
// its socket, on a file pool. Absolute times are those of one machine; what is
// compared is compared within one run. `make bench` runs all of it, and
// docs/benchmarks.md has what came out.
package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const size = 64 << 20

// population is a driver whose pool has so many volumes, and a part of them in
// use.
type population struct {
	*harness.Driver

	existing []string // IDs
	made     atomic.Int64
}

// populate starts a driver whose pool has n volumes, some of them in use: as
// block devices, attached and published.
func populate(b *testing.B, n, inUse int) *population {
	b.Helper()
	p := &population{Driver: harness.Start(b, harness.FilePool("2Ti")), existing: make([]string, n)}
	each(b, 16, n, func(i int) (err error) {
		p.existing[i], err = p.create(fmt.Sprintf("existing-%d", i), harness.Block(harness.Writer))
		return err
	})
	each(b, 4, inUse, func(i int) error {
		return p.use(fmt.Sprintf("existing-%d", i), p.existing[i], harness.Block(harness.Writer))
	})
	return p
}

// name gives a name that nothing has.
func (p *population) name() string { return fmt.Sprintf("new-%d", p.made.Add(1)) }

func (p *population) create(name string, c *csi.VolumeCapability, change ...func(*csi.CreateVolumeRequest)) (id string, err error) {
	r := &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{c}, CapacityRange: &csi.CapacityRange{RequiredBytes: size}}
	for _, change := range change {
		change(r)
	}
	response, err := p.CreateVolume(context.Background(), r)
	return response.GetVolume().GetVolumeId(), err
}

func (p *population) delete(id string) error {
	_, err := p.DeleteVolume(context.Background(), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

func (p *population) stage(name, id string, c *csi.VolumeCapability) error {
	staging := filepath.Join(p.Dir, "staging", name)
	if err := os.MkdirAll(staging, 0o750); err != nil {
		return err
	}
	_, err := p.NodeStageVolume(context.Background(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: c})
	return err
}

func (p *population) publish(name, id string, c *csi.VolumeCapability) error {
	_, err := p.NodePublishVolume(context.Background(), &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: filepath.Join(p.Dir, "staging", name), TargetPath: p.Target(name), VolumeCapability: c,
	})
	return err
}

func (p *population) unpublish(name, id string) error {
	_, err := p.NodeUnpublishVolume(context.Background(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: p.Target(name)})
	return err
}

func (p *population) unstage(name, id string) error {
	_, err := p.NodeUnstageVolume(context.Background(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: filepath.Join(p.Dir, "staging", name)})
	return err
}

func (p *population) use(name, id string, c *csi.VolumeCapability) error {
	if err := p.stage(name, id, c); err != nil {
		return err
	}
	return p.publish(name, id, c)
}

// poolDir is where the pool's own filesystem is mounted.
func poolDir(d *harness.Driver) string { return filepath.Join(d.Dir, "state", "mounts", "default") }

// operation is one call that is measured: do makes it, and undo takes away what
// is then there. Both are made by what comes before, which is not measured.
type operation struct {
	name    string
	prepare func(p *population) (do, undo func() error, err error)
}

var ext4 = harness.Mount("ext4", harness.Writer)

func nothing() error { return nil }

// operations are the calls, and with fsync what of them is the disk's: a file
// made, synced and renamed, and its directory synced, on the pool's filesystem.
var operations = []operation{
	{"fsync", func(p *population) (do, undo func() error, err error) {
		dir, err := os.MkdirTemp(poolDir(p.Driver), "fsync-")
		return func() error { return syncedFile(dir) }, func() error { return os.RemoveAll(dir) }, err
	}},
	{"CreateVolume", func(p *population) (do, undo func() error, err error) {
		var id string
		do = func() (err error) {
			id, err = p.create(p.name(), ext4)
			return err
		}
		return do, func() error { return p.delete(id) }, nil
	}},
	{"CreateVolume-clone", func(p *population) (do, undo func() error, err error) {
		source, err := p.create(p.name(), ext4)
		var id string
		do = func() (err error) {
			id, err = p.create(p.name(), ext4, harness.FromVolume(source))
			return err
		}
		return do, func() error { return first(p.delete(id), p.delete(source)) }, err
	}},
	{"DeleteVolume", func(p *population) (do, undo func() error, err error) {
		id, err := p.create(p.name(), ext4)
		return func() error { return p.delete(id) }, nothing, err
	}},
	{"CreateSnapshot", func(p *population) (do, undo func() error, err error) {
		source, err := p.create(p.name(), ext4)
		var id string
		do = func() error {
			response, err := p.CreateSnapshot(context.Background(), &csi.CreateSnapshotRequest{Name: p.name(), SourceVolumeId: source})
			id = response.GetSnapshot().GetSnapshotId()
			return err
		}
		undo = func() error {
			_, err := p.DeleteSnapshot(context.Background(), &csi.DeleteSnapshotRequest{SnapshotId: id})
			return first(err, p.delete(source))
		}
		return do, undo, err
	}},
	{"ControllerExpandVolume", func(p *population) (do, undo func() error, err error) {
		id, err := p.create(p.name(), ext4)
		do = func() error {
			_, err := p.ControllerExpandVolume(context.Background(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * size}})
			return err
		}
		return do, func() error { return p.delete(id) }, err
	}},
	{"GetCapacity", func(p *population) (do, undo func() error, err error) {
		return func() error {
			_, err := p.GetCapacity(context.Background(), &csi.GetCapacityRequest{})
			return err
		}, nothing, nil
	}},
	{"ListVolumes-10", func(p *population) (do, undo func() error, err error) {
		return func() error {
			_, err := p.ListVolumes(context.Background(), &csi.ListVolumesRequest{MaxEntries: 10})
			return err
		}, nothing, nil
	}},
	{"ControllerGetVolumeHealth", func(p *population) (do, undo func() error, err error) {
		return func() error {
			_, err := p.ControllerGetVolumeHealth(context.Background(), &csi.ControllerGetVolumeHealthRequest{VolumeId: p.existing[0]})
			return err
		}, nothing, nil
	}},
	{"NodeStageVolume-empty", func(p *population) (do, undo func() error, err error) {
		name := p.name()
		id, err := p.create(name, ext4)
		return func() error { return p.stage(name, id, ext4) }, func() error { return first(p.unstage(name, id), p.delete(id)) }, err
	}},
	{"NodeStageVolume-formatted", func(p *population) (do, undo func() error, err error) {
		name := p.name()
		id, err := p.create(name, ext4)
		err = first(err, p.stage(name, id, ext4), p.unstage(name, id))
		return func() error { return p.stage(name, id, ext4) }, func() error { return first(p.unstage(name, id), p.delete(id)) }, err
	}},
	{"NodePublishVolume", func(p *population) (do, undo func() error, err error) {
		name := p.name()
		id, err := p.create(name, ext4)
		err = first(err, p.stage(name, id, ext4))
		undo = func() error { return first(p.unpublish(name, id), p.unstage(name, id), p.delete(id)) }
		return func() error { return p.publish(name, id, ext4) }, undo, err
	}},
	{"NodeUnpublishVolume", func(p *population) (do, undo func() error, err error) {
		name := p.name()
		id, err := p.create(name, ext4)
		err = first(err, p.use(name, id, ext4))
		return func() error { return p.unpublish(name, id) }, func() error { return first(p.unstage(name, id), p.delete(id)) }, err
	}},
	{"NodeUnstageVolume", func(p *population) (do, undo func() error, err error) {
		name := p.name()
		id, err := p.create(name, ext4)
		err = first(err, p.stage(name, id, ext4))
		return func() error { return p.unstage(name, id) }, func() error { return p.delete(id) }, err
	}},
}

// first is the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// byHand makes the files of a volume on the pool's filesystem as the driver does,
// and nothing else: in a directory beside others, synced, renamed to where others
// are, and that synced.
var byHand = operation{"by-hand", func(p *population) (do, undo func() error, err error) {
	staging, volumes := filepath.Join(poolDir(p.Driver), "by-hand", "staging"), filepath.Join(poolDir(p.Driver), "by-hand", "volumes")
	name := p.name()
	do = func() error {
		dir := filepath.Join(staging, name)
		err := first(
			os.Mkdir(dir, 0o700),
			synced(filepath.Join(dir, "metadata"), os.O_WRONLY|os.O_CREATE, func(f *os.File) error {
				_, err := f.Write(make([]byte, 512))
				return err
			}),
			synced(filepath.Join(dir, "data"), os.O_WRONLY|os.O_CREATE, func(f *os.File) error { return f.Truncate(size) }),
			synced(dir, os.O_RDONLY, nil))
		return first(err, os.Rename(dir, filepath.Join(volumes, name)), synced(volumes, os.O_RDONLY, nil))
	}
	return do, func() error { return os.RemoveAll(filepath.Join(volumes, name)) }, first(os.MkdirAll(staging, 0o700), os.MkdirAll(volumes, 0o700))
}}

// synced opens something, does something with it, and brings it to stable storage.
func synced(path string, flag int, do func(*os.File) error) error {
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if do != nil {
		if err := do(f); err != nil {
			return err
		}
	}
	return f.Sync()
}

func syncedFile(dir string) error {
	staged := filepath.Join(dir, "staged")
	f, err := os.Create(staged)
	if err != nil {
		return err
	}
	_, err = f.WriteString("{}")
	if err = first(err, f.Sync(), f.Close(), os.Rename(staged, filepath.Join(dir, "placed"))); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return first(d.Sync(), d.Close())
}

// BenchmarkCall measures each call beside few and many volumes, one at a time
// and many at once.
func BenchmarkCall(b *testing.B) {
	for _, n := range pick([]int{10, 1000, 10_000}, []int{10, 1000}) {
		b.Run(fmt.Sprintf("volumes=%d", n), func(b *testing.B) {
			measureAll(b, populate(b, n, 2), pick([]int{1, 8, 32}, []int{1, 32})...)
		})
	}
}

// BenchmarkManyVolumes sets each call beside many volumes against the same beside
// few, which are another driver's, in turns.
func BenchmarkManyVolumes(b *testing.B) {
	beside := []*population{populate(b, 10, 2), populate(b, pick(10_000, 1000), 2)}
	for _, o := range operations {
		b.Run(o.name, func(b *testing.B) {
			took := make([][]time.Duration, len(beside))
			for turn := range b.N {
				for i := range beside {
					at := (i + turn) % len(beside)
					do, undo, err := o.prepare(beside[at])
					must(b, err)
					begin := time.Now()
					must(b, do())
					took[at] = append(took[at], time.Since(begin))
					must(b, undo())
				}
			}
			few, many := quantile(took[0], 0.5), quantile(took[1], 0.5)
			b.ReportMetric(ms(few), "few-p50-ms")
			b.ReportMetric(ms(many), "many-p50-ms")
			b.ReportMetric(float64(many)/float64(few), "many/few")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkCallInUse measures each call beside few and many volumes that are in
// use, which the kernel knows loop devices and mounts of.
func BenchmarkCallInUse(b *testing.B) {
	for _, n := range []int{10, 200} {
		b.Run(fmt.Sprintf("inuse=%d", n), func(b *testing.B) {
			measureAll(b, populate(b, 200, n), 1)
		})
	}
}

func measureAll(b *testing.B, p *population, inFlight ...int) {
	b.Helper()
	for _, o := range operations {
		b.Run(o.name, func(b *testing.B) {
			for _, n := range inFlight {
				b.Run(fmt.Sprintf("inflight=%d", n), func(b *testing.B) { o.measure(b, p, n) })
			}
		})
	}
}

func (o operation) measure(b *testing.B, p *population, inFlight int) {
	b.Helper()
	took, speed := o.run(b, p, inFlight, b.N)
	reportLatency(b, took)
	b.ReportMetric(speed, "calls/s")
}

// run makes so many calls, and tells what each took and how many there were in a
// second.
func (o operation) run(b *testing.B, p *population, inFlight, calls int) (took []time.Duration, speed float64) {
	b.Helper()
	do, undo := make([]func() error, calls), make([]func() error, calls)
	each(b, 8, calls, func(i int) (err error) {
		do[i], undo[i], err = o.prepare(p)
		return err
	})
	took = make([]time.Duration, calls)
	begin := time.Now()
	each(b, inFlight, calls, func(i int) error {
		begin := time.Now()
		err := do[i]()
		took[i] = time.Since(begin)
		return err
	})
	speed = float64(calls) / time.Since(begin).Seconds()
	each(b, 8, calls, func(i int) error { return undo[i]() })
	return took, speed
}

// BenchmarkInFlight sets what many calls at once get done against one at a time,
// in turns: for CreateVolume, for the same files made by hand, and for the syncs of
// files that share no directory.
func BenchmarkInFlight(b *testing.B) {
	const many = 32
	p := populate(b, 1000, 2)
	measured := []operation{operations[0], operations[1], byHand}
	speedup, against := make([][]float64, len(measured)), make([]float64, 0, b.N)
	for turn := range b.N {
		speed := make([]float64, len(measured))
		for i := range measured {
			at := (i + turn) % len(measured)
			_, one := measured[at].run(b, p, 1, 2*many)
			_, speed[at] = measured[at].run(b, p, many, 10*many)
			speedup[at] = append(speedup[at], speed[at]/one)
		}
		against = append(against, speed[1]/speed[2])
	}
	for i, o := range measured {
		reportRatio(b, speedup[i], fmt.Sprintf("%s-%d/1", o.name, many))
	}
	reportRatio(b, against, fmt.Sprintf("CreateVolume-%d/by-hand-%d", many, many))
	b.ReportMetric(0, "ns/op")
}
