package driver

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/cluster"
	"github.com/orlop-csi/orlop/pkg/router"
)

// clusterClaims is what the objects of a Kubernetes cluster claim.
type clusterClaims struct{ cluster.Claims }

// Claimed implements router.Claimer.
func (c clusterClaims) Claimed(ctx context.Context) (router.Claims, error) {
	asOf := time.Now() // everything is read after
	volumes, snapshots, err := c.Claims.Claimed(ctx)
	return router.Claims{Volumes: volumes, Snapshots: snapshots, AsOf: asOf}, err
}

var orphansMetric = Metric{
	Name:   "orlop_orphans",
	Type:   "gauge",
	Help:   "Volumes and snapshots on a node that nothing has claimed for the grace period. Not there while that is not known.",
	Labels: []string{"kind", "node"},
}

// orphanCollector tells of the last scan for orphans.
type orphanCollector struct{ last atomic.Pointer[router.Report] }

// observe notes the outcome of a scan and tells the log what is new.
func (c *orphanCollector) observe(r router.Report, err error) {
	if err != nil {
		c.last.Store(nil)
		klog.InfoS("Whether there are orphans is unknown", "err", brief(err.Error()))
		return
	}
	c.last.Store(&r)
	for _, o := range r.New {
		klog.InfoS("Orphan: nothing claims what a node holds; see csi-driver orphans",
			"kind", o.Kind, "id", o.ID, "node", o.Node, "bytes", o.Bytes, "unclaimedSince", o.Since)
	}
}

func (c *orphanCollector) Describe(out chan<- *prometheus.Desc) { out <- orphansMetric.desc() }

func (c *orphanCollector) Collect(out chan<- prometheus.Metric) {
	r := c.last.Load()
	if r == nil {
		return
	}
	type label struct {
		kind router.Kind
		node string
	}
	counts := map[label]int{}
	for _, u := range r.Unclaimed {
		if u.Orphan {
			counts[label{u.Kind, u.Node}]++
		}
	}
	for _, node := range r.Nodes {
		for _, kind := range r.Kinds {
			out <- prometheus.MustNewConstMetric(orphansMetric.desc(), prometheus.GaugeValue, float64(counts[label{kind, node}]), string(kind), node)
		}
	}
}
