package driver

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// mostConditions bounds the volumes whose conditions are told one by one, so
// that a disk that fails with a thousand volumes on it is not a flood.
const mostConditions = 100

var (
	unhealthyMetric = Metric{
		Name: "orlop_unhealthy_volumes",
		Type: "gauge",
		Help: "Volumes with something wrong.",
	}
	conditionMetric = Metric{
		Name:   "orlop_volume_condition",
		Type:   "gauge",
		Help:   "1 for each thing that is wrong with a volume, of at most 100 volumes; the status is degraded, inaccessible or data_loss. Nothing for healthy ones.",
		Labels: []string{"volume", "status", "reason"},
	}
)

// conditionCollector reads at each scrape which volumes have something wrong.
type conditionCollector func(ctx context.Context) ([]pool.Unhealthy, error)

func (c conditionCollector) Describe(out chan<- *prometheus.Desc) {
	out <- unhealthyMetric.desc()
	out <- conditionMetric.desc()
}

// Collect gives nothing where it cannot be told.
func (c conditionCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	all, err := c(ctx)
	if err != nil {
		return
	}
	out <- prometheus.MustNewConstMetric(unhealthyMetric.desc(), prometheus.GaugeValue, float64(len(all)))
	for _, u := range all[:min(len(all), mostConditions)] {
		type entry struct {
			severity pool.Severity
			reason   string
		}
		told := map[entry]bool{}
		for _, condition := range u.Conditions {
			e := entry{condition.Severity, condition.Reason}
			if !told[e] {
				out <- prometheus.MustNewConstMetric(conditionMetric.desc(), prometheus.GaugeValue, 1, u.ID, e.severity.String(), e.reason)
			}
			told[e] = true
		}
	}
}
