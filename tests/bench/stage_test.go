//go:build integration

package bench

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

// BenchmarkStage sets the staging of an empty volume against what one would do
// by hand on the same kind of loop device: mkfs with its default options, and
// mount. In turns; the ratio of the times, and of the disk that the empty
// filesystems take. (Attaching is in the driver's time, and not in the other.)
// By hand there are no records of what is on the device; what the driver's two take
// of the disk is told beside: two files that are written, synced and put in place.
func BenchmarkStage(b *testing.B) {
	d := harness.Start(b, "pools:\n- name: default\n  source:\n    file: {path: \"$DIR/default.img\", size: 100Gi, sparse: true}\n  overcommit: 1000\n")
	p := &population{Driver: d}
	byHand := filepath.Join(b.TempDir(), "mount")
	must(b, os.Mkdir(byHand, 0o700))
	for _, fs := range []string{"ext4", "xfs"} {
		for _, gib := range []int64{1, 1024} {
			b.Run(fmt.Sprintf("%s/size=%dGiB", fs, gib), func(b *testing.B) {
				c := harness.Mount(fs, harness.Writer)
				var driver, hand, records []time.Duration
				var times, recorded, disk []float64
				scratch := filepath.Join(poolDir(d), "records")
				must(b, os.Mkdir(scratch, 0o700))
				defer os.RemoveAll(scratch)
				for range b.N {
					name := p.name()
					id, err := p.create(name, c, func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = gib << 30 })
					must(b, err)
					image, err := os.Create(filepath.Join(poolDir(d), "by-hand"))
					must(b, err)
					must(b, image.Truncate(gib<<30))
					device, err := loop.Attach(image, loop.Options{BlockSize: 4096})
					must(b, err)

					begin := time.Now()
					must(b, p.stage(name, id, c))
					driver = append(driver, time.Since(begin))
					begin = time.Now()
					command(b, "mkfs."+fs, "-q", device.Path)
					command(b, "mount", "-t", fs, device.Path, byHand)
					hand = append(hand, time.Since(begin))
					begin = time.Now()
					must(b, first(syncedFile(scratch), syncedFile(scratch)))
					records = append(records, time.Since(begin))
					must(b, unix.Syncfs(int(image.Fd())))
					last := len(driver) - 1
					times = append(times, float64(driver[last])/float64(hand[last]))
					recorded = append(recorded, float64(driver[last])/float64(hand[last]+records[last]))
					disk = append(disk, float64(blocks(b, filepath.Join(poolDir(d), "volumes", name, "data")))/float64(blocks(b, image.Name())))

					must(b, unix.Unmount(byHand, 0))
					must(b, device.Detach(b.Context()))
					must(b, first(image.Close(), os.Remove(image.Name())))
					must(b, first(p.unstage(name, id), p.delete(id)))
				}
				b.ReportMetric(ms(quantile(driver, 0.5)), "stage-ms")
				b.ReportMetric(ms(quantile(hand, 0.5)), "by-hand-ms")
				b.ReportMetric(ms(quantile(records, 0.5)), "records-ms")
				reportRatio(b, times, "of-by-hand")
				reportRatio(b, recorded, "of-by-hand-recorded")
				b.ReportMetric(quantile(disk, 0.5), "disk-of-by-hand")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func command(b *testing.B, name string, arguments ...string) {
	b.Helper()
	if out, err := exec.Command(name, arguments...).CombinedOutput(); err != nil {
		b.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// blocks is what a file takes on the disk, in bytes.
func blocks(b *testing.B, path string) int64 {
	b.Helper()
	var stat syscall.Stat_t
	must(b, syscall.Stat(path, &stat))
	return stat.Blocks * 512
}
