//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/harness"
)

const routerGiB = 1 << 30

// onNode makes CreateVolume name one node, as a scheduler does.
func onNode(name string) func(*csi.CreateVolumeRequest) {
	topology := &csi.Topology{Segments: map[string]string{request.TopologyKey: name}}
	return func(r *csi.CreateVolumeRequest) {
		r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{topology}, Preferred: []*csi.Topology{topology}}
	}
}

func routerNode(v *csi.Volume) string {
	return v.GetAccessibleTopology()[0].GetSegments()[request.TopologyKey]
}

func routerWant(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%v; want %s", err, code)
	}
	for _, word := range words {
		if err != nil && !strings.Contains(err.Error(), word) {
			t.Errorf("%v; want it to say %q", err, word)
		}
	}
}

func threeNodes(t *testing.T) *harness.Fleet {
	t.Helper()
	return harness.StartFleet(t, harness.FilePool("4Gi"), harness.FilePool("8Gi"), harness.FilePool("4Gi"))
}

func TestRouterMakesAVolumeOnTheNodeThatIsNamed(t *testing.T) {
	f := threeNodes(t)
	for _, n := range f.Nodes {
		v := f.Create("pvc-"+n.Node, routerGiB, harness.Block(harness.Writer), onNode(n.Node))
		if got := routerNode(v); got != n.Node {
			t.Errorf("volume for %s is on %s", n.Node, got)
		}
		if again := f.Create("pvc-"+n.Node, routerGiB, harness.Block(harness.Writer), onNode(n.Node)); again.GetVolumeId() != v.GetVolumeId() {
			t.Errorf("a retry made %s beside %s", again.GetVolumeId(), v.GetVolumeId())
		}
	}
	_, err := f.CreateVolume(f.Context(), &csi.CreateVolumeRequest{
		Name: "large", VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)},
		CapacityRange:             &csi.CapacityRange{RequiredBytes: 5 * routerGiB},
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{request.TopologyKey: "node-1"}}}},
	})
	routerWant(t, err, codes.ResourceExhausted, "node node-1")
}

func TestRouterPutsAVolumeForNoNodeWhereMostRoomIs(t *testing.T) {
	f := threeNodes(t)
	v := f.Create("free", routerGiB, harness.Block(harness.Writer))
	if got := routerNode(v); got != "node-2" {
		t.Errorf("it is on %s; node-2 has most room", got)
	}
	// A retry finds it, though by now another node has most room.
	f.Create("filler", 5*routerGiB, harness.Block(harness.Writer), onNode("node-2"))
	if again := f.Create("free", routerGiB, harness.Block(harness.Writer)); again.GetVolumeId() != v.GetVolumeId() {
		t.Errorf("a retry made %s beside %s", again.GetVolumeId(), v.GetVolumeId())
	}
	_, err := f.CreateVolume(f.Context(), &csi.CreateVolumeRequest{
		Name: "free", VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * routerGiB},
	})
	routerWant(t, err, codes.AlreadyExists)
}

func TestRouterMakesCopiesWhereTheirSourceIsIfItMay(t *testing.T) {
	f := threeNodes(t)
	v := f.Create("source", routerGiB, harness.Block(harness.Writer), onNode("node-3"))
	s := f.Snapshot("snap", v.GetVolumeId())
	for name, from := range map[string]func(*csi.CreateVolumeRequest){
		"clone": harness.FromVolume(v.GetVolumeId()), "restore": harness.FromSnapshot(s.GetSnapshotId()),
	} {
		if got := routerNode(f.Create(name, 0, harness.Block(harness.Writer), from)); got != "node-3" {
			t.Errorf("%s is on %s", name, got)
		}
	}
	elsewhere := f.Create("elsewhere", 0, harness.Block(harness.Writer), onNode("node-1"), harness.FromSnapshot(s.GetSnapshotId()))
	if got := routerNode(elsewhere); got != "node-1" {
		t.Errorf("what must be on node-1 is on %s", got)
	}
	other := f.Create("other", routerGiB, harness.Block(harness.Writer), onNode("node-1"))
	_, err := f.CreateSnapshot(f.Context(), &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: other.GetVolumeId()})
	routerWant(t, err, codes.AlreadyExists)
}

func TestRouterListsAllNodesInPages(t *testing.T) {
	f := threeNodes(t)
	want := map[string]bool{}
	for i := range 10 {
		v := f.Create(fmt.Sprintf("v-%d", i), 4096, harness.Block(harness.Writer), onNode(f.Nodes[i%3].Node))
		want[v.GetVolumeId()] = true
	}
	for _, size := range []int32{0, 1, 2, 3, 7, 10, 11} {
		got, token := map[string]bool{}, ""
		for {
			page, err := f.ListVolumes(f.Context(), &csi.ListVolumesRequest{MaxEntries: size, StartingToken: token})
			if err != nil {
				t.Fatal(err)
			}
			if size > 0 && len(page.GetEntries()) > int(size) {
				t.Fatalf("a page of %d for %d", len(page.GetEntries()), size)
			}
			for _, e := range page.GetEntries() {
				if got[e.GetVolume().GetVolumeId()] {
					t.Errorf("pages of %d: %s twice", size, e.GetVolume().GetVolumeId())
				}
				got[e.GetVolume().GetVolumeId()] = true
			}
			if token = page.GetNextToken(); token == "" {
				break
			}
		}
		if len(got) != len(want) {
			t.Errorf("pages of %d: %d volumes of %d", size, len(got), len(want))
		}
	}
	_, err := f.ListVolumes(f.Context(), &csi.ListVolumesRequest{StartingToken: "nonsense"})
	routerWant(t, err, codes.Aborted)
}

func TestANodeThatIsDownIsUnavailable(t *testing.T) {
	f := threeNodes(t)
	v := f.Create("there", routerGiB, harness.Block(harness.Writer), onNode("node-1"))
	f.Nodes[0].Stop()
	_, err := f.DeleteVolume(f.Context(), &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
	routerWant(t, err, codes.Unavailable, "node-1")
	_, err = f.ListVolumes(f.Context(), &csi.ListVolumesRequest{})
	routerWant(t, err, codes.Unavailable, "node-1")
	// It might hold what a retry looks for.
	_, err = f.CreateVolume(f.Context(), &csi.CreateVolumeRequest{
		Name: "anywhere", VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)},
	})
	routerWant(t, err, codes.Unavailable, "node-1", "anywhere")
	// Where it cannot be, nothing is lost.
	f.Create("elsewhere", routerGiB, harness.Block(harness.Writer), onNode("node-2"))

	f.Nodes[0].Start()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := f.DeleteVolume(f.Context(), &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
		if err == nil {
			return
		}
		routerWant(t, err, codes.Unavailable)
		if time.Now().After(deadline) {
			t.Fatal("the node is back, and is not found")
		}
	}
}

func TestWhatWasOnANodeThatIsGoneCanBeDeleted(t *testing.T) {
	f := threeNodes(t)
	v := f.Create("lost", routerGiB, harness.Block(harness.Writer), onNode("node-1"))
	s := f.Snapshot("lost", v.GetVolumeId())
	f.Nodes[0].Stop()
	f.Route(f.Nodes[1], f.Nodes[2])
	_, err := f.ControllerGetVolume(f.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.GetVolumeId()})
	routerWant(t, err, codes.NotFound, "gone")
	if _, err := f.DeleteSnapshot(f.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()}); err != nil {
		t.Error(err)
	}
	f.Delete(v.GetVolumeId())
	// While another node does not answer, its disk may be there.
	f.Nodes[1].Stop()
	_, err = f.DeleteVolume(f.Context(), &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
	routerWant(t, err, codes.Unavailable, "node-1", "node-2")
}

func TestAPoolThatMovedToAnotherNodeIsFound(t *testing.T) {
	f := threeNodes(t)
	v := f.Create("moved", routerGiB, harness.Block(harness.Writer), onNode("node-1"))
	f.Nodes[0].Stop()
	f.Nodes[2].Stop()
	old := filepath.Join(f.Nodes[0].Dir, "default.img")
	if err := os.Rename(old, filepath.Join(f.Nodes[2].Dir, "moved.img")); err != nil {
		t.Fatal(err)
	}
	f.Nodes[2].Configure(harness.FilePool("4Gi") + "- name: moved\n  source:\n    file: {path: $DIR/moved.img, size: 4Gi, sparse: true}\n")
	f.Nodes[2].Start()
	f.Route(f.Nodes[1], f.Nodes[2])
	found, err := f.ControllerGetVolume(f.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.GetVolumeId()})
	if err != nil {
		t.Fatal(err)
	}
	if got := routerNode(found.GetVolume()); got != "node-3" {
		t.Errorf("it is on %s", got)
	}
	f.Delete(v.GetVolumeId())
	if _, err := f.Nodes[2].ControllerGetVolume(f.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.GetVolumeId()}); status.Code(err) != codes.NotFound {
		t.Errorf("after its deletion: %v", err)
	}
}

func TestRouterAddsUpCapacity(t *testing.T) {
	f := threeNodes(t)
	var sum, most int64
	for _, n := range f.Nodes {
		one, err := f.GetCapacity(f.Context(), &csi.GetCapacityRequest{
			AccessibleTopology: &csi.Topology{Segments: map[string]string{request.TopologyKey: n.Node}},
		})
		if err != nil {
			t.Fatal(err)
		}
		direct, err := n.GetCapacity(n.Context(), &csi.GetCapacityRequest{})
		if err != nil || direct.GetAvailableCapacity() != one.GetAvailableCapacity() {
			t.Errorf("%s has %d, and the router says %d (%v)", n.Node, direct.GetAvailableCapacity(), one.GetAvailableCapacity(), err)
		}
		sum += one.GetAvailableCapacity()
		most = max(most, one.GetMaximumVolumeSize().GetValue())
	}
	all, err := f.GetCapacity(f.Context(), &csi.GetCapacityRequest{})
	if err != nil || all.GetAvailableCapacity() != sum || all.GetMaximumVolumeSize().GetValue() != most {
		t.Errorf("%v, %v; want %d and at most %d", all, err, sum, most)
	}
}
