package router

import (
	"testing"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Of a node that does not answer nothing is told, which is not the same as that
// all is well there.
func TestHealthIsToldNodeByNode(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib, gib)
	v := made(t, s, volume("v", among("node-1")))
	nodes[0].mu.Lock()
	nodes[0].sick = map[string][]pool.Condition{"v": {{Severity: pool.DataLoss, Reason: "ImageMissing", Message: "restore it"}}}
	nodes[0].mu.Unlock()
	nodes[2].server.Stop()
	told, err := s.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	one, answered := told["node-1"]
	if !answered || len(one) != 1 || one[0].GetVolumeId() != v || one[0].GetHealthStatuses()[0].GetReason() != "ImageMissing" {
		t.Errorf("node-1 tells %v", one)
	}
	if two, answered := told["node-2"]; !answered || len(two) > 0 {
		t.Errorf("node-2 tells %v, %v", two, answered)
	}
	if three, answered := told["node-3"]; answered {
		t.Errorf("node-3, which is down, tells %v", three)
	}
}
