package driver

import (
	"context"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/kubelet"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/router"
)

// Metric describes one metric of the driver, for its documentation.
type Metric struct {
	Name, Type, Help string
	Labels           []string
}

func (m Metric) desc() *prometheus.Desc {
	return prometheus.NewDesc(m.Name, m.Help, m.Labels, nil)
}

var (
	operationsMetric = Metric{
		// The name and the labels are those of the other CSI drivers and
		// sidecars (csi-lib-utils, package metrics), so that dashboards fit.
		Name:   "csi_plugin_operations_seconds",
		Type:   "histogram",
		Help:   "Duration of CSI calls in seconds, by method and gRPC status code.",
		Labels: []string{"driver_name", "method_name", "grpc_status_code"},
	}
	buildMetric = Metric{
		Name:   "orlop_build_info",
		Type:   "gauge",
		Help:   "Always 1; the labels tell the driver's version and the Go version it was built with.",
		Labels: []string{"version", "go_version"},
	}
	certificateMetric = Metric{
		Name: "orlop_peer_certificate_expiration_timestamp_seconds",
		Type: "gauge",
		Help: "When the certificate between router and nodes that this process shows ends, in seconds since 1970; 0 if it has none.",
	}
	nodesMetric = Metric{
		Name:   "orlop_nodes",
		Type:   "gauge",
		Help:   "Nodes that have the driver, by whether a pod of it is ready there: serving, or away; only with --kubernetes. Not there while that is not known.",
		Labels: []string{"state"},
	}
	registeredMetric = Metric{
		Name: "orlop_kubelet_registered",
		Type: "gauge",
		Help: "1 if the kubelet has registered the driver, else 0; only with --kubelet-registration-dir.",
	}
)

// operationsBuckets begins where creating a volume takes its few milliseconds,
// and ends where sidecars give up.
var operationsBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

// poolMetric is a gauge of a pool and how it is read.
type poolMetric struct {
	Metric
	value func(poolState) float64
}

func gauge(name, help string, value func(poolState) float64) poolMetric {
	return poolMetric{Metric{Name: name, Type: "gauge", Help: help, Labels: []string{"pool"}}, value}
}

// poolMetrics begins with the one that a pool always has.
var poolMetrics = []poolMetric{
	gauge("orlop_pool_healthy", "1 if nothing is wrong with the pool as a whole, else 0.",
		func(s poolState) float64 { return s.healthy }),
	gauge("orlop_pool_capacity_bytes", "What the pool could hold.",
		func(s poolState) float64 { return float64(s.Total) }),
	gauge("orlop_pool_reserve_bytes", "What of the capacity is kept free on purpose.",
		func(s poolState) float64 { return float64(s.Reserve) }),
	gauge("orlop_pool_used_bytes", "Blocks in use now.",
		func(s poolState) float64 { return float64(s.Used) }),
	gauge("orlop_pool_provisioned_bytes", "Bytes promised: volumes at their full size, snapshots at what they may come to hold alone.",
		func(s poolState) float64 { return float64(s.Provisioned) }),
	gauge("orlop_pool_available_bytes", "Bytes that a new volume may be promised.",
		func(s poolState) float64 { return float64(s.Available) }),
	gauge("orlop_pool_volumes", "Volumes in the pool, without damaged ones.",
		func(s poolState) float64 { return float64(s.Volumes) }),
	gauge("orlop_pool_snapshots", "Snapshots in the pool.",
		func(s poolState) float64 { return float64(s.Snapshots) }),
	gauge("orlop_pool_damaged_volumes", "Volumes in the pool that cannot be used because what is on disk cannot be trusted.",
		func(s poolState) float64 { return float64(s.Damaged) }),
}

// poolState is one pool at the time of a scrape.
type poolState struct {
	pool.Capacity
	pool.Counts
	healthy float64
}

// Metrics lists what /metrics serves beside the metrics of the Go runtime (go_)
// and of the process (process_).
func Metrics() []Metric {
	all := []Metric{operationsMetric}
	for _, m := range poolMetrics {
		all = append(all, m.Metric)
	}
	return append(all, unhealthyMetric, conditionMetric, certificateMetric, registeredMetric, nodesMetric, orphansMetric, copiesMetric, copiedMetric, buildMetric)
}

// gaugeOf makes a gauge without labels that is read at each scrape.
func gaugeOf(m Metric, value func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: m.Name, Help: m.Help}, value)
}

func certificateExpiry(c *peer.Credentials) prometheus.Collector {
	return gaugeOf(certificateMetric, func() float64 {
		if expires := c.Expires(); !expires.IsZero() {
			return float64(expires.Unix())
		}
		return 0
	})
}

// nodesCollector counts the nodes of a router at each scrape.
type nodesCollector struct{ router.Discovery }

func (c nodesCollector) Describe(out chan<- *prometheus.Desc) { out <- nodesMetric.desc() }

func (c nodesCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return
	}
	states := map[string]int{"serving": 0, "away": 0}
	for _, n := range nodes {
		if n.Address == "" {
			states["away"]++
		} else {
			states["serving"]++
		}
	}
	for state, count := range states {
		out <- prometheus.MustNewConstMetric(nodesMetric.desc(), prometheus.GaugeValue, float64(count), state)
	}
}

func registered(r *kubelet.Registration) prometheus.Collector {
	return gaugeOf(registeredMetric, func() float64 {
		if r.Accepted() {
			return 1
		}
		return 0
	})
}

// newRegistry makes a registry of what is known before any pool is open.
func newRegistry(version string) (*prometheus.Registry, *callMetrics) {
	calls := newCallMetrics()
	build := prometheus.MustNewConstMetric(buildMetric.desc(), prometheus.GaugeValue, 1, version, runtime.Version())
	r := prometheus.NewRegistry()
	r.MustRegister(
		calls.seconds,
		constant{build},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return r, calls
}

// callMetrics counts and times calls.
type callMetrics struct {
	seconds *prometheus.HistogramVec
}

func newCallMetrics() *callMetrics {
	return &callMetrics{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    operationsMetric.Name,
		Help:    operationsMetric.Help,
		Buckets: operationsBuckets,
	}, operationsMetric.Labels)}
}

func (m *callMetrics) observe(method string, code codes.Code, took time.Duration) {
	m.seconds.WithLabelValues(Name, method, code.String()).Observe(took.Seconds())
}

// constant is a metric that never changes.
type constant struct{ prometheus.Metric }

func (c constant) Describe(out chan<- *prometheus.Desc) { out <- c.Desc() }
func (c constant) Collect(out chan<- prometheus.Metric) { out <- c.Metric }

// meteredPool is what of a [pool.Engine] the metrics are read from.
type meteredPool interface {
	Info() pool.Info
	Capacity(ctx context.Context) (pool.Capacity, error)
	Health(ctx context.Context) []pool.Condition
	Counts() pool.Counts
}

// scrapeTimeout bounds what one pool may take to tell its state.
const scrapeTimeout = 5 * time.Second

// poolCollector reads the state of the pools at each scrape.
type poolCollector[P meteredPool] []P

func (c poolCollector[P]) Describe(out chan<- *prometheus.Desc) {
	for _, m := range poolMetrics {
		out <- m.desc()
	}
}

// Collect gives what can be read. A pool that cannot tell its capacity has
// orlop_pool_healthy at 0 and none of the gauges: nothing is better than a
// number that is wrong.
func (c poolCollector[P]) Collect(out chan<- prometheus.Metric) {
	for _, p := range c {
		metrics := poolMetrics
		state, err := stateOf(p)
		if err != nil {
			metrics = metrics[:1]
		}
		for _, m := range metrics {
			out <- prometheus.MustNewConstMetric(m.desc(), prometheus.GaugeValue, m.value(state), p.Info().Name)
		}
	}
}

func stateOf(p meteredPool) (poolState, error) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	capacity, err := p.Capacity(ctx)
	if err != nil {
		return poolState{}, err
	}
	s := poolState{Capacity: capacity, Counts: p.Counts()}
	if len(p.Health(ctx)) == 0 {
		s.healthy = 1
	}
	return s, nil
}
