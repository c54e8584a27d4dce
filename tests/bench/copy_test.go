//go:build integration

package bench

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/harness"
)

// What a restore on another node takes, beside a plain copy of the same bytes,
// from the file on the one node's disk over TCP to a file on the other's, on
// stable storage in the end. In turns, neither with anything in memory.
func BenchmarkRestoreOnAnotherNode(b *testing.B) {
	const size = 1 << 30
	f := harness.StartFleet(b, harness.FilePool("8Gi"), harness.FilePool("8Gi"))
	block := harness.Block(harness.Writer)
	on := func(node string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) {
			topology := &csi.Topology{Segments: map[string]string{request.TopologyKey: node}}
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{topology}, Preferred: []*csi.Topology{topology}}
		}
	}
	source := f.Create("source", size, block, on("node-1")).GetVolumeId()
	fill(b, f.Nodes[0].Use("source", source, block), size)
	snapshot := f.Snapshot("snapshot", source).GetSnapshotId()
	pool := func(n *harness.Driver) string { return filepath.Join(n.Dir, "state", "mounts", "default") }
	image := filepath.Join(pool(f.Nodes[0]), "snapshots", "snapshot", "data")
	var plain, restored, plainBusy, restoredBusy time.Duration
	drivers := func() time.Duration { return processorTime(b, f.Nodes[0].Pid()) + processorTime(b, f.Nodes[1].Pid()) }
	for b.Loop() {
		forget(b)
		begin, busy := time.Now(), ownProcessorTime(b)
		copyPlainly(b, image, filepath.Join(pool(f.Nodes[1]), ".staging", "plain"))
		plain += time.Since(begin)
		plainBusy += ownProcessorTime(b) - busy

		forget(b)
		begin, busy = time.Now(), drivers()
		v := f.Create("restored", 0, block, on("node-2"), harness.FromSnapshot(snapshot))
		restored += time.Since(begin)
		restoredBusy += drivers() - busy
		f.Delete(v.GetVolumeId())
	}
	f.Nodes[0].Release("source", source)
	b.ReportMetric(plain.Seconds()*1000/float64(b.N), "plain-ms")
	b.ReportMetric(restored.Seconds()*1000/float64(b.N), "restored-ms")
	b.ReportMetric(plainBusy.Seconds()*1000/float64(b.N), "plain-cpu-ms")
	b.ReportMetric(restoredBusy.Seconds()*1000/float64(b.N), "restored-cpu-ms")
	b.ReportMetric(plain.Seconds()/restored.Seconds(), "throughput-ratio")
}

// fill writes n bytes that no filesystem can leave out.
func fill(b *testing.B, path string, n int64) {
	b.Helper()
	device, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(b, err)
	defer device.Close()
	random, err := os.Open("/dev/urandom")
	must(b, err)
	defer random.Close()
	_, err = io.CopyN(device, random, n)
	must(b, err)
	must(b, device.Sync())
}

// forget makes the kernel read from the disk again.
func forget(b *testing.B) {
	b.Helper()
	must(b, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// copyPlainly copies a file over a connection, as fast as the kernel can.
func copyPlainly(b *testing.B, from, to string) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	defer l.Close()
	received := make(chan error, 1)
	go func() {
		received <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			out, err := os.Create(to)
			if err != nil {
				return err
			}
			defer os.Remove(to)
			defer out.Close()
			if _, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{c}, make([]byte, 1<<20)); err != nil {
				return err
			}
			return out.Sync()
		}()
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	must(b, err)
	in, err := os.Open(from)
	must(b, err)
	defer in.Close()
	_, err = io.Copy(c, in) // sendfile(2)
	must(b, err)
	must(b, c.Close())
	must(b, <-received)
}

// ownProcessorTime is that of this process; see getrusage(2).
func ownProcessorTime(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
