//go:build integration

package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// quick shortens what takes long: fewer volumes, smaller files, shorter runs.
var quick = os.Getenv("ORLOP_BENCH_QUICK") != ""

// pick is the first, or in a quick run the second.
func pick[T any](whole, short T) T {
	if quick {
		return short
	}
	return whole
}

// quantile is the q-quantile of a sample (0.5 is the median), between the two
// nearest that are in it.
func quantile[T float64 | time.Duration](sample []T, q float64) T {
	sorted := slices.Sorted(slices.Values(sample))
	if len(sorted) == 0 {
		return 0
	}
	at := q * float64(len(sorted)-1)
	below := sorted[int(at)]
	above := sorted[min(int(at)+1, len(sorted)-1)]
	return below + T((at-float64(int(at)))*float64(above-below))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// reportLatency tells the median and the 99th percentile of what single calls
// took.
func reportLatency(b *testing.B, took []time.Duration) {
	b.Helper()
	b.ReportMetric(ms(quantile(took, 0.5)), "p50-ms")
	b.ReportMetric(ms(quantile(took, 0.99)), "p99-ms")
	b.ReportMetric(0, "ns/op") // of all that was in flight: means nothing by itself
}

// reportRatio tells the median of ratios, and the quartiles around it.
func reportRatio(b *testing.B, ratios []float64, unit string) {
	b.Helper()
	b.ReportMetric(quantile(ratios, 0.5), unit)
	b.ReportMetric(quantile(ratios, 0.25), unit+"-q1")
	b.ReportMetric(quantile(ratios, 0.75), unit+"-q3")
}

// each runs work for 0 to n-1, so many at once.
func each(b *testing.B, atOnce, n int, work func(i int) error) {
	b.Helper()
	var next atomic.Int64
	var running sync.WaitGroup
	for range min(atOnce, n) {
		running.Go(func() {
			for i := next.Add(1) - 1; i < int64(n) && !b.Failed(); i = next.Add(1) - 1 {
				if err := work(int(i)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	running.Wait()
	if b.Failed() {
		b.FailNow()
	}
}

func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// residentMiB is the resident memory of a process (proc_pid_status(5)).
func residentMiB(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			must(b, err)
			return kb / 1024
		}
	}
	b.Fatal("the process has no VmRSS")
	return 0
}

// processorTime is what a process has used so far (proc_pid_stat(5)), and those
// of its children that it has waited for.
func processorTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	must(b, err)
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, field := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.Atoi(field)
		must(b, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

func open(b *testing.B, path string) *os.File {
	b.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	must(b, err)
	b.Cleanup(func() { f.Close() })
	return f
}

// aligned makes a buffer as direct I/O wants it.
func aligned(b *testing.B, size int) []byte {
	b.Helper()
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(b, err)
	b.Cleanup(func() { _ = unix.Munmap(buffer) })
	return buffer
}
