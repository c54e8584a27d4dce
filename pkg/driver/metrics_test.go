package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/kubelet"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/router"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

// fixedPool is a pool in a state that a test chose.
type fixedPool struct {
	name     string
	capacity pool.Capacity
	counts   pool.Counts
	broken   error
	health   []pool.Condition
}

func (p fixedPool) Info() pool.Info                                 { return pool.Info{Name: p.name} }
func (p fixedPool) Counts() pool.Counts                             { return p.counts }
func (p fixedPool) Health(context.Context) []pool.Condition         { return p.health }
func (p fixedPool) Capacity(context.Context) (pool.Capacity, error) { return p.capacity, p.broken }

func TestThePoolsStateIsInTheMetrics(t *testing.T) {
	registry, _ := newRegistry("v1.2.3")
	registry.MustRegister(poolCollector[fixedPool]{
		{
			name:     "default",
			capacity: pool.Capacity{Total: 1 << 40, Reserve: 5, Provisioned: 7, Used: 11, Available: 13},
			counts:   pool.Counts{Volumes: 10_000, Snapshots: 17, Damaged: 1},
		},
		{name: "sick", health: []pool.Condition{{Severity: pool.Degraded}}},
		{name: "dead", broken: errors.New("input/output error")},
	})
	const want = `
# HELP orlop_pool_available_bytes Bytes that a new volume may be promised.
# TYPE orlop_pool_available_bytes gauge
orlop_pool_available_bytes{pool="default"} 13
orlop_pool_available_bytes{pool="sick"} 0
# HELP orlop_pool_capacity_bytes What the pool could hold.
# TYPE orlop_pool_capacity_bytes gauge
orlop_pool_capacity_bytes{pool="default"} 1.099511627776e+12
orlop_pool_capacity_bytes{pool="sick"} 0
# HELP orlop_pool_damaged_volumes Volumes in the pool that cannot be used because what is on disk cannot be trusted.
# TYPE orlop_pool_damaged_volumes gauge
orlop_pool_damaged_volumes{pool="default"} 1
orlop_pool_damaged_volumes{pool="sick"} 0
# HELP orlop_pool_healthy 1 if nothing is wrong with the pool as a whole, else 0.
# TYPE orlop_pool_healthy gauge
orlop_pool_healthy{pool="dead"} 0
orlop_pool_healthy{pool="default"} 1
orlop_pool_healthy{pool="sick"} 0
# HELP orlop_pool_provisioned_bytes Bytes promised: volumes at their full size, snapshots at what they may come to hold alone.
# TYPE orlop_pool_provisioned_bytes gauge
orlop_pool_provisioned_bytes{pool="default"} 7
orlop_pool_provisioned_bytes{pool="sick"} 0
# HELP orlop_pool_reserve_bytes What of the capacity is kept free on purpose.
# TYPE orlop_pool_reserve_bytes gauge
orlop_pool_reserve_bytes{pool="default"} 5
orlop_pool_reserve_bytes{pool="sick"} 0
# HELP orlop_pool_snapshots Snapshots in the pool.
# TYPE orlop_pool_snapshots gauge
orlop_pool_snapshots{pool="default"} 17
orlop_pool_snapshots{pool="sick"} 0
# HELP orlop_pool_used_bytes Blocks in use now.
# TYPE orlop_pool_used_bytes gauge
orlop_pool_used_bytes{pool="default"} 11
orlop_pool_used_bytes{pool="sick"} 0
# HELP orlop_pool_volumes Volumes in the pool, without damaged ones.
# TYPE orlop_pool_volumes gauge
orlop_pool_volumes{pool="default"} 10000
orlop_pool_volumes{pool="sick"} 0
`
	var names []string
	for _, m := range poolMetrics {
		names = append(names, m.Name)
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry, names...); err != nil || len(problems) > 0 {
		t.Errorf("%v (error %v)", problems, err)
	}
}

func TestConditionsOfVolumesAreInTheMetrics(t *testing.T) {
	var unhealthy []pool.Unhealthy
	var fails error
	registry, _ := newRegistry("v1.2.3")
	registry.MustRegister(conditionCollector(func(context.Context) ([]pool.Unhealthy, error) { return unhealthy, fails }))
	names := []string{unhealthyMetric.Name, conditionMetric.Name}
	check := func(rule, want string) {
		t.Helper()
		if err := testutil.GatherAndCompare(registry, strings.NewReader(want), names...); err != nil {
			t.Errorf("%s: %v", rule, err)
		}
	}
	head := "# HELP orlop_unhealthy_volumes " + unhealthyMetric.Help + "\n# TYPE orlop_unhealthy_volumes gauge\n"
	check("all are well", head+"orlop_unhealthy_volumes 0\n")
	unhealthy = []pool.Unhealthy{
		{ID: "node-1/abc/v", Conditions: []pool.Condition{
			{Severity: pool.DataLoss, Reason: "ImageMissing"},
			{Severity: pool.Degraded, Reason: "MetadataDamaged", Message: "one"},
			{Severity: pool.Degraded, Reason: "MetadataDamaged", Message: "another"},
		}},
	}
	check("one is not", head+"orlop_unhealthy_volumes 1\n"+
		"# HELP orlop_volume_condition "+conditionMetric.Help+"\n# TYPE orlop_volume_condition gauge\n"+
		`orlop_volume_condition{reason="ImageMissing",status="data_loss",volume="node-1/abc/v"} 1`+"\n"+
		`orlop_volume_condition{reason="MetadataDamaged",status="degraded",volume="node-1/abc/v"} 1`+"\n")
	for i := range 1000 {
		unhealthy = append(unhealthy, pool.Unhealthy{ID: fmt.Sprint(i), Conditions: unhealthy[0].Conditions[:1]})
	}
	if n, err := testutil.GatherAndCount(registry, conditionMetric.Name); err != nil || n != mostConditions+1 {
		t.Errorf("%d conditions, %v", n, err)
	}
	fails = errors.New("a test")
	check("it cannot be told", "")
}

func TestCallsAreTimedByMethodAndCode(t *testing.T) {
	registry, calls := newRegistry("v1.2.3")
	calls.observe("/csi.v1.Controller/CreateVolume", codes.OK, 4*time.Millisecond)
	calls.observe("/csi.v1.Controller/CreateVolume", codes.OK, time.Hour)
	calls.observe("/csi.v1.Node/NodeStageVolume", codes.Aborted, 0)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, f := range families {
		if f.GetName() != "csi_plugin_operations_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			got[strings.Join(labels, " ")] = m.GetHistogram().GetSampleCount()
		}
	}
	want := map[string]uint64{
		"driver_name=csi.orlop.dev grpc_status_code=OK method_name=/csi.v1.Controller/CreateVolume":   2,
		"driver_name=csi.orlop.dev grpc_status_code=Aborted method_name=/csi.v1.Node/NodeStageVolume": 1,
	}
	for labels, n := range want {
		if got[labels] != n {
			t.Errorf("%s: got %d, want %d", labels, got[labels], n)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
}

func TestEveryMetricIsDocumentedAndEveryDocumentedOneIsServed(t *testing.T) {
	registry, calls := newRegistry("v1.2.3")
	calls.observe("/csi.v1.Identity/Probe", codes.OK, 0)
	registry.MustRegister(poolCollector[fixedPool]{{name: "default"}})
	registry.MustRegister(conditionCollector(func(context.Context) ([]pool.Unhealthy, error) {
		return []pool.Unhealthy{{ID: "v", Conditions: []pool.Condition{{Severity: pool.Degraded, Reason: "Test"}}}}, nil
	}))
	registry.MustRegister(certificateExpiry(peer.New(func() (peer.Keys, error) { return peer.Keys{}, nil })), registered(&kubelet.Registration{}))
	registry.MustRegister(nodesCollector{router.Static{}})
	registry.MustRegister(copyCollectors(transfer.New(transfer.Options{}))...)
	orphans := &orphanCollector{}
	orphans.observe(router.Report{Nodes: []string{"node-1"}, Kinds: []router.Kind{router.KindVolume}}, nil)
	registry.MustRegister(orphans)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, f := range families {
		if name := f.GetName(); !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			got = append(got, name+" "+strings.ToLower(f.GetType().String())+" "+f.GetHelp())
		}
	}
	for _, m := range Metrics() {
		want = append(want, m.Name+" "+m.Type+" "+m.Help)
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("served\n%s\ndocumented\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// coming is a fleet of which nothing is known yet.
type coming struct{ router.Static }

func (coming) Nodes(context.Context) ([]router.Node, error) { return nil, errors.New("not yet") }

func TestNodesAreCountedByWhetherTheirDriverServes(t *testing.T) {
	for name, test := range map[string]struct {
		nodes router.Discovery
		want  map[string]float64
	}{
		"some":    {router.Static{{Segment: "a", Address: "192.0.2.1:9810"}, {Segment: "b"}, {Segment: "c"}}, map[string]float64{"serving": 1, "away": 2}},
		"none":    {router.Static{}, map[string]float64{"serving": 0, "away": 0}},
		"unknown": {coming{}, map[string]float64{}},
	} {
		registry := prometheus.NewRegistry()
		registry.MustRegister(nodesCollector{test.nodes})
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				got[m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
			}
		}
		if !maps.Equal(got, test.want) {
			t.Errorf("%s: %v; want %v", name, got, test.want)
		}
	}
}
