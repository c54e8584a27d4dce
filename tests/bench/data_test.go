//go:build integration

package bench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/tests/harness"
)

// BenchmarkBlockVolume compares a block volume with a plain file on the pool's
// own filesystem, both with direct I/O, one request at a time. It takes turns
// between the two in short rounds, so that a machine that is busy for a while
// is so for both, and reports the median of the ratios of speed: 1 is as fast
// as the file.
func BenchmarkBlockVolume(b *testing.B) {
	const span = 256 << 20
	d := harness.Start(b, harness.FilePool("8Gi"))
	c := harness.Block(harness.Writer)
	v := d.Create("volume", span, c)
	device := open(b, d.Use("volume", v.GetVolumeId(), c))
	plain := open(b, filepath.Join(d.Dir, "state", "mounts", "default", "plain"))
	buffer := aligned(b, 1<<20)
	for _, f := range []*os.File{device, plain} { // nothing is written for the first time later
		for off := int64(0); off < span; off += int64(len(buffer)) {
			if _, err := f.WriteAt(buffer, off); err != nil {
				b.Fatal(err)
			}
		}
	}
	for _, kind := range []struct {
		name   string
		size   int64
		random bool
		do     func(f *os.File, p []byte, off int64) (int, error)
	}{
		{"random read of 4 KiB", 4 << 10, true, (*os.File).ReadAt},
		{"random write of 4 KiB", 4 << 10, true, (*os.File).WriteAt},
		{"sequential read of 1 MiB", 1 << 20, false, (*os.File).ReadAt},
		{"sequential write of 1 MiB", 1 << 20, false, (*os.File).WriteAt},
	} {
		b.Run(kind.name, func(b *testing.B) {
			round := func(f *os.File, offsets []int64) time.Duration {
				begin := time.Now()
				for _, off := range offsets {
					if _, err := kind.do(f, buffer[:kind.size], off); err != nil {
						b.Fatal(err)
					}
				}
				return time.Since(begin)
			}
			var ratios []float64
			for range b.N {
				offsets := make([]int64, 64)
				for i := range offsets {
					offsets[i] = int64(i) * kind.size
					if kind.random {
						offsets[i] = rand.Int64N(span/kind.size) * kind.size
					}
				}
				onFile, onVolume := round(plain, offsets), round(device, offsets)
				ratios = append(ratios, float64(onFile)/float64(onVolume))
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "of-file")
			b.ReportMetric(0, "ns/op") // of both together: means nothing
		})
	}
}

func open(b *testing.B, path string) *os.File {
	b.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return f
}

// aligned makes a buffer as direct I/O wants it.
func aligned(b *testing.B, size int) []byte {
	b.Helper()
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		b.Fatal(fmt.Errorf("mmap: %w", err))
	}
	b.Cleanup(func() { _ = unix.Munmap(buffer) })
	return buffer
}
