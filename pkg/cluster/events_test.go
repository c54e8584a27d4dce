package cluster

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// sick is what a node tells of a volume.
func sick(volume string, reasons ...string) *csi.VolumeHealth {
	health := &csi.VolumeHealth{VolumeId: volume}
	for _, reason := range reasons {
		health.HealthStatuses = append(health.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: csi.VolumeHealthErrorType_DEGRADED, Reason: reason, Message: "do something",
		})
	}
	return health
}

type told = map[string][]*csi.VolumeHealth

func TestAChangeOfHealthIsToldOnce(t *testing.T) {
	h := health{}
	fleet := map[string]bool{"node-1": true, "node-2": true}
	for _, step := range []struct {
		rule string
		told told
		want []string
	}{
		{"all are well", told{"node-1": nil, "node-2": nil}, nil},
		{"one is not", told{"node-1": {sick("v", "Torn")}, "node-2": nil}, []string{"v DEGRADED Torn begun"}},
		{"it stays so", told{"node-1": {sick("v", "Torn")}, "node-2": nil}, nil},
		{"one more thing, and another volume", told{"node-1": {sick("v", "Lost", "Torn")}, "node-2": {sick("w", "Lost")}}, []string{"v DEGRADED Lost begun", "w DEGRADED Lost begun"}},
		{"a node does not answer", told{"node-2": {sick("w", "Lost")}}, nil},
		{"it answers again", told{"node-1": {sick("v", "Torn")}, "node-2": {sick("w", "Lost")}}, []string{"v DEGRADED Lost mended"}},
		{"all are well again", told{"node-1": nil, "node-2": nil}, []string{"v DEGRADED Torn mended", "w DEGRADED Lost mended"}},
		{"it comes back", told{"node-1": {sick("v", "Torn")}}, []string{"v DEGRADED Torn begun"}},
	} {
		var got []string
		for _, c := range h.update(step.told, func(node string) bool { return fleet[node] }) {
			got = append(got, fmt.Sprintf("%s %s %s %s", c.volume, c.status, c.reason, map[bool]string{true: "begun", false: "mended"}[c.begun]))
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%s: %q, want %q", step.rule, got, step.want)
		}
	}
	delete(fleet, "node-1")
	if changes := h.update(told{"node-2": nil}, func(node string) bool { return fleet[node] }); len(changes) > 0 || len(h) != 1 {
		t.Errorf("of a node that has left: %v, %v", changes, h)
	}
}

func TestAChangeThatCouldNotBeToldIsOneAgain(t *testing.T) {
	h := health{}
	all := func(string) bool { return true }
	for _, next := range []told{{"node-1": {sick("v", "Torn")}}, {"node-1": nil}} {
		for range 3 {
			changes := h.update(next, all)
			if len(changes) != 1 {
				t.Fatalf("%d changes, want 1", len(changes))
			}
			h.undo(changes[0])
		}
		if changes := h.update(next, all); len(changes) != 1 {
			t.Fatalf("%d changes, want 1", len(changes))
		}
		if changes := h.update(next, all); len(changes) != 0 {
			t.Fatalf("%d changes, want none", len(changes))
		}
	}
}

func TestTheNameOfAnEventTellsItFromOthers(t *testing.T) {
	seen := map[string]bool{}
	for _, claim := range []core.ObjectReference{{Name: "data", UID: "1"}, {Name: "data", UID: "2"}, {Name: strings.Repeat("a", 253), UID: "3"}} {
		for _, c := range []condition{{"v", "DEGRADED", "Torn"}, {"v", "DATA_LOSS", "Torn"}, {"v", "DEGRADED", "Lost"}, {"w", "DEGRADED", "Lost"}} {
			for _, begun := range []bool{true, false} {
				name := eventName(claim, change{c, "node-1", "a message", begun})
				if seen[name] {
					t.Errorf("%s is the name of two", name)
				}
				seen[name] = true
				if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
					t.Errorf("%s: %v", name, problems)
				}
				if again := eventName(claim, change{c, "node-2", "another message", begun}); again != name {
					t.Errorf("what another router tells is called %s, not %s", again, name)
				}
			}
		}
	}
}
