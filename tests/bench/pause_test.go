//go:build integration

package bench

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/extent"
	"github.com/orlop-csi/orlop/tests/harness"
)

// BenchmarkSnapshotOfLiveVolume tells for how long a running writer waits for a
// snapshot of a volume of 4 GiB that was written at random, against the same
// writer's wait for the reflink alone of the same image (FICLONE): the limit of
// the mechanism. In turns.
func BenchmarkSnapshotOfLiveVolume(b *testing.B) {
	volume := pick[int64](4<<30, 1<<30)
	d := harness.Start(b, harness.FilePool("40Gi"))
	p := &population{Driver: d}
	for _, kind := range []struct {
		name       string
		capability *csi.VolumeCapability
	}{
		{"block", harness.Block(harness.Writer)},
		{"ext4", ext4},
		{"xfs", harness.Mount("xfs", harness.Writer)},
	} {
		b.Run(kind.name, func(b *testing.B) {
			name := p.name()
			id, err := p.create(name, kind.capability, func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = volume + volume/4 })
			must(b, err)
			must(b, p.use(name, id, kind.capability))
			path := p.Target(name)
			if kind.capability.GetBlock() == nil {
				path = filepath.Join(path, "file")
			}
			file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
			must(b, err)
			fillAtRandom(b, file, volume)
			w := startWriter(b, file, volume)
			image, err := os.Open(filepath.Join(poolDir(d), "volumes", name, "data"))
			must(b, err)
			b.Run("pause", func(b *testing.B) { pauses(b, p, w, id, image) })
			w.stop()
			must(b, first(image.Close(), file.Close(), p.unpublish(name, id), p.unstage(name, id), p.delete(id)))
		})
	}
}

func pauses(b *testing.B, p *population, w *writer, id string, image *os.File) {
	b.Helper()
	info, err := image.Stat()
	must(b, err)
	var pauses, alone, clones, calls []time.Duration
	for range b.N {
		time.Sleep(100 * time.Millisecond) // the writer writes anew what is shared
		to, err := os.Create(filepath.Join(poolDir(p.Driver), "reflink"))
		must(b, err)
		w.reset()
		begin := time.Now()
		must(b, extent.Clone(to, image))
		clones = append(clones, time.Since(begin))
		alone = append(alone, w.longest())
		must(b, first(os.Remove(to.Name()), to.Close()))

		time.Sleep(100 * time.Millisecond)
		w.reset()
		begin = time.Now()
		snapshot := p.Snapshot(p.name(), id).GetSnapshotId()
		calls = append(calls, time.Since(begin))
		pauses = append(pauses, w.longest())
		_, err = p.DeleteSnapshot(b.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
		must(b, err)
	}
	b.ReportMetric(float64(count(b, image, info.Size())), "extents")
	b.ReportMetric(ms(quantile(clones, 0.5)), "ficlone-ms")
	b.ReportMetric(ms(quantile(alone, 0.5)), "ficlone-pause-p50-ms")
	b.ReportMetric(ms(quantile(alone, 1)), "ficlone-pause-max-ms")
	b.ReportMetric(ms(quantile(pauses, 0.5)), "pause-p50-ms")
	b.ReportMetric(ms(quantile(pauses, 1)), "pause-max-ms")
	b.ReportMetric(ms(quantile(calls, 0.5)), "call-ms")
	b.ReportMetric(float64(quantile(pauses, 0.5))/float64(quantile(clones, 0.5)), "of-ficlone")
	b.ReportMetric(0, "ns/op")
}

// fillAtRandom writes all of a file once, in pieces of 16 KiB in random order.
func fillAtRandom(b *testing.B, f *os.File, n int64) {
	b.Helper()
	const piece = 16 << 10
	order := rand.Perm(int(n / piece))
	const writers = 16
	buffers := make([][]byte, writers)
	for i := range buffers {
		buffers[i] = aligned(b, piece)
	}
	each(b, writers, writers, func(w int) error {
		for i := w; i < len(order); i += writers {
			if _, err := f.WriteAt(buffers[w], int64(order[i])*piece); err != nil {
				return err
			}
		}
		return nil
	})
	must(b, f.Sync())
}

// writer writes blocks of 4 KiB at random, one after the other, without the page
// cache.
type writer struct {
	b    *testing.B
	end  chan struct{}
	done sync.WaitGroup

	mu    sync.Mutex
	began time.Time // of the write under way
	most  time.Duration
}

func startWriter(b *testing.B, f *os.File, span int64) *writer {
	b.Helper()
	w := &writer{b: b, end: make(chan struct{})}
	buffer := aligned(b, 4096)
	w.done.Go(func() {
		for {
			select {
			case <-w.end:
				return
			default:
			}
			w.mu.Lock()
			w.began = time.Now()
			w.mu.Unlock()
			if _, err := f.WriteAt(buffer, rand.Int64N(span/4096)*4096); err != nil {
				b.Error(err)
				return
			}
			w.mu.Lock()
			w.most = max(w.most, time.Since(w.began))
			w.mu.Unlock()
		}
	})
	return w
}

func (w *writer) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.most = 0
}

// longest is the longest write since reset.
func (w *writer) longest() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return max(w.most, time.Since(w.began))
}

func (w *writer) stop() {
	close(w.end)
	w.done.Wait()
}

// count is the number of extents of a file.
func count(b *testing.B, f *os.File, n int64) (extents int) {
	b.Helper()
	for some, err := range extent.Map(b.Context(), f, 0, n) {
		must(b, err)
		extents += len(some)
	}
	return extents
}
