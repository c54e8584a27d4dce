//go:build integration

package bench

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/tests/harness"
)

// BenchmarkDelta asks what changed between two snapshots of a volume of 10 GiB
// that was written at random, 40,000 blocks of 4 KiB before the first and 10,000
// between the two, and what is allocated in the second. Beside it stands what it
// takes to find that out by reading both and comparing them. It tells the time
// of the call, the driver's processor time, and how many times as long the
// comparing took.
func BenchmarkDelta(b *testing.B) {
	const span = 10 << 30
	d := harness.Start(b, harness.FilePool("40Gi"))
	c := harness.Block(harness.Writer)
	v := d.Create("volume", span, c).GetVolumeId()
	device := open(b, d.Use("volume", v, c))
	scatter(b, device, span, 40_000)
	base := d.Snapshot("base", v).GetSnapshotId()
	scatter(b, device, span, 10_000)
	target := d.Snapshot("target", v).GetSnapshotId()

	var changed harness.Metadata
	var asking time.Duration
	for name, ask := range map[string]func() (harness.Metadata, error){
		"delta": func() (m harness.Metadata, err error) {
			begin := time.Now()
			m, err = d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target})
			asking = time.Since(begin)
			changed = m
			return m, err
		},
		"allocated": func() (harness.Metadata, error) {
			return d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: target})
		},
	} {
		b.Run(name, func(b *testing.B) {
			var ranges int
			before := processorTime(b, d.Pid())
			for range b.N {
				m, err := ask()
				if err != nil {
					b.Fatal(err)
				}
				ranges = len(m.Ranges)
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/call")
			b.ReportMetric(float64((processorTime(b, d.Pid())-before).Milliseconds())/float64(b.N), "cpu-ms/call")
			b.ReportMetric(float64(ranges), "ranges")
			b.ReportMetric(0, "ns/op")
		})
	}
	b.Run("comparing", func(b *testing.B) {
		image := func(id string) *os.File {
			return open(b, filepath.Join(d.Dir, "state", "mounts", "default", "snapshots", path.Base(id), "data"))
		}
		before, after := image(base), image(target)
		for range b.N {
			if n := compare(b, before, after, span, changed); n == 0 {
				b.Fatal("nothing differs")
			}
		}
		b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/call")
		b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(asking), "of-delta")
		b.ReportMetric(0, "ns/op")
	})
}

// scatter writes blocks of 4 KiB at random.
func scatter(b *testing.B, device *os.File, span int64, blocks int) {
	b.Helper()
	const size, writers = 4096, 16
	var work sync.WaitGroup
	for range writers {
		buffer := aligned(b, size)
		work.Go(func() {
			for range blocks / writers {
				for i := range buffer {
					buffer[i] = byte(rand.Uint32())
				}
				if _, err := device.WriteAt(buffer, rand.Int64N(span/size)*size); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	work.Wait()
}

// compare reads two files and gives the number of blocks that differ, each of
// which must be in a range.
func compare(b *testing.B, before, after *os.File, span int64, changed harness.Metadata) (n int) {
	b.Helper()
	const size = 1 << 20
	left, right := aligned(b, size), aligned(b, size)
	ranges := changed.Ranges
	for off := int64(0); off < span; off += size {
		for f, buffer := range map[*os.File][]byte{before: left, after: right} {
			if _, err := f.ReadAt(buffer, off); err != nil {
				b.Fatal(err)
			}
		}
		if bytes.Equal(left, right) {
			continue
		}
		for i := 0; i < size; i += 4096 {
			if bytes.Equal(left[i:i+4096], right[i:i+4096]) {
				continue
			}
			n++
			at := off + int64(i)
			for len(ranges) > 0 && ranges[0].GetByteOffset()+ranges[0].GetSizeBytes() <= at {
				ranges = ranges[1:]
			}
			if len(ranges) == 0 || ranges[0].GetByteOffset() > at {
				b.Fatalf("the block at %d differs and was not told", at)
			}
		}
	}
	return n
}
