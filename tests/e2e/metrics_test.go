package e2e

import (
	"fmt"
	"testing"
)

// Every pod of the driver says that it is well, and counts what it does: a
// volume that is made shows in the metrics of the controller and of its node.
func TestMetrics(t *testing.T) {
	s := newSpace(t)
	node := nodes[len(nodes)-1]
	before := count(t, "orlop_pool_volumes")
	s.apply(join(claimYAML, podYAML+onNode), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "app", "node", node)
	s.runs("app")
	s.sh("app", fill("/data/file", 8))
	if got := count(t, "orlop_pool_volumes"); got != before+1 {
		t.Errorf("the nodes count %d volumes, want %d", got, before+1)
	}
	created := 0.0
	const series = `csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="%s"}`
	for _, p := range driverPods(t, "controller") {
		if body, err := get(p.Name, routeMetrics, "healthz"); err != nil {
			t.Errorf("%s is not well: %v %s", p.Name, err, body)
		}
		page, err := metrics(p.Name, routeMetrics)
		must(t, err)
		if n, err := sample(page, fmt.Sprintf(series, "/csi.v1.Controller/CreateVolume")); err == nil {
			created += n // the other replica may have made none
		}
	}
	if created < 1 {
		t.Error("no controller counts a volume that it made")
	}
	for _, n := range nodes {
		pod := nodePod(t, n)
		if body, err := get(pod, nodeMetrics, "healthz"); err != nil {
			t.Errorf("%s is not well: %v %s", pod, err, body)
		}
		page, err := metrics(pod, nodeMetrics)
		must(t, err)
		if healthy, err := sample(page, `orlop_pool_healthy{pool="default"}`); err != nil || healthy != 1 {
			t.Errorf("the pool on %s is not healthy: %g %v", n, healthy, err)
		}
	}
	page, err := metrics(nodePod(t, node), nodeMetrics)
	must(t, err)
	for _, method := range []string{"/csi.v1.Controller/CreateVolume", "/csi.v1.Node/NodeStageVolume", "/csi.v1.Node/NodePublishVolume"} {
		if n, err := sample(page, fmt.Sprintf(series, method)); err != nil || n < 1 {
			t.Errorf("%s counts %g of %s: %v", node, n, method, err)
		}
	}
}
