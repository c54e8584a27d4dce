//go:build integration

package bench

import (
	"fmt"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/tests/harness"
)

// BenchmarkFootprint tells what the driver takes of a machine: until it serves
// from a start on, with the pool's filesystem mounted anew, and its resident
// memory then; the processor time of one that nobody calls; and both of one that
// makes and removes volumes, eight at once.
func BenchmarkFootprint(b *testing.B) {
	for _, n := range pick([]int{0, 100, 1000, 10_000}, []int{0, 1000}) {
		b.Run(fmt.Sprintf("volumes=%d", n), func(b *testing.B) {
			d := harness.Start(b, harness.FilePool("2Ti"))
			p := &population{Driver: d}
			each(b, 16, n, func(i int) error {
				_, err := p.create(fmt.Sprintf("existing-%d", i), harness.Block(harness.Writer))
				return err
			})
			b.Run("process", func(b *testing.B) { footprint(b, p) })
		})
	}
}

func footprint(b *testing.B, p *population) {
	b.Helper()
	const calls = 200
	span := pick(3*time.Second, time.Second)
	var starts []time.Duration
	var idle, idleCPU, busy, busyCPU []float64
	for range b.N {
		p.Stop()
		begin := time.Now()
		p.Start()
		starts = append(starts, time.Since(begin))
		before := processorTime(b, p.Pid())
		begin = time.Now()
		time.Sleep(span)
		idleCPU = append(idleCPU, ms(processorTime(b, p.Pid())-before)/time.Since(begin).Seconds())
		idle = append(idle, residentMiB(b, p.Pid()))
		before = processorTime(b, p.Pid())
		each(b, 8, calls, func(int) error {
			id, err := p.create(p.name(), ext4)
			return first(err, p.delete(id))
		})
		busyCPU = append(busyCPU, ms(processorTime(b, p.Pid())-before)/calls)
		busy = append(busy, residentMiB(b, p.Pid()))
	}
	b.ReportMetric(ms(quantile(starts, 0.5)), "start-ms")
	b.ReportMetric(quantile(idle, 0.5), "idle-MiB")
	b.ReportMetric(quantile(idleCPU, 0.5), "idle-cpu-ms/s")
	b.ReportMetric(quantile(busy, 0.5), "busy-MiB")
	b.ReportMetric(quantile(busyCPU, 0.5), "cpu-ms/volume")
	b.ReportMetric(0, "ns/op")
}
