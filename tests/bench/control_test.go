//go:build integration

// Package bench measures the driver as its users meet it: the real process over
// its socket, on a file pool. Absolute times are those of one machine; what is
// compared is compared within one run. `make bench` runs all of it.
package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const size = 64 << 20

// populated starts a driver whose pool has n volumes.
func populated(b *testing.B, n int) *harness.Driver {
	b.Helper()
	d := harness.Start(b, harness.FilePool("200Gi"))
	var workers sync.WaitGroup
	for w := range 8 {
		workers.Go(func() {
			for i := w; i < n; i += 8 {
				d.Create(fmt.Sprintf("existing-%d", i), size, harness.Block(harness.Writer))
			}
		})
	}
	workers.Wait()
	return d
}

var populations = []int{10, 1000}

// forEach runs a benchmark beside few and beside many volumes.
func forEach(b *testing.B, run func(b *testing.B, d *harness.Driver)) {
	b.Helper()
	for _, n := range populations {
		b.Run(fmt.Sprintf("volumes=%d", n), func(b *testing.B) {
			d := populated(b, n)
			b.ResetTimer()
			run(b, d)
			b.StopTimer()
		})
	}
}

func BenchmarkCreateVolume(b *testing.B) {
	forEach(b, func(b *testing.B, d *harness.Driver) {
		for i := range b.N {
			d.Create(fmt.Sprintf("new-%d", i), size, harness.Block(harness.Writer))
		}
	})
}

func BenchmarkDeleteVolume(b *testing.B) {
	forEach(b, func(b *testing.B, d *harness.Driver) {
		for i := range b.N {
			b.StopTimer()
			v := d.Create(fmt.Sprintf("new-%d", i), size, harness.Block(harness.Writer))
			b.StartTimer()
			d.Delete(v.GetVolumeId())
		}
	})
}

func BenchmarkCreateSnapshot(b *testing.B) {
	forEach(b, func(b *testing.B, d *harness.Driver) {
		v := d.Create("source", size, harness.Block(harness.Writer))
		b.ResetTimer()
		for i := range b.N {
			d.Snapshot(fmt.Sprintf("new-%d", i), v.GetVolumeId())
		}
	})
}

func BenchmarkGetCapacity(b *testing.B) {
	forEach(b, func(b *testing.B, d *harness.Driver) {
		for range b.N {
			if _, err := d.GetCapacity(d.Context(), &csi.GetCapacityRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkFsync is what the calls above stand beside: a file made, synced and
// renamed, and its directory synced, on the filesystem that holds the pool.
func BenchmarkFsync(b *testing.B) {
	dir := b.TempDir()
	sync := func(path string) {
		f, err := os.Open(path)
		if err == nil {
			err = f.Sync()
			f.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	for i := range b.N {
		staged := filepath.Join(dir, "staged")
		if err := os.WriteFile(staged, []byte("{}"), 0o600); err != nil {
			b.Fatal(err)
		}
		sync(staged)
		if err := os.Rename(staged, filepath.Join(dir, strconv.Itoa(i))); err != nil {
			b.Fatal(err)
		}
		sync(dir)
	}
}

// BenchmarkIdle tells the resident memory of a driver that has just been
// started, and the time until it serves.
func BenchmarkIdle(b *testing.B) {
	forEach(b, func(b *testing.B, d *harness.Driver) {
		var rss float64
		var starting time.Duration
		for range b.N {
			d.Stop()
			begin := time.Now()
			d.Start()
			starting += time.Since(begin)
			rss = max(rss, residentMiB(b, d.Pid()))
		}
		b.ReportMetric(rss, "MiB-RSS")
		b.ReportMetric(float64(starting.Milliseconds())/float64(b.N), "ms-to-serve")
	})
}

func residentMiB(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				b.Fatal(err)
			}
			return kb / 1024
		}
	}
	b.Fatal("the process has no VmRSS")
	return 0
}
