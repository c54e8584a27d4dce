//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/tests/harness"
)

// groupHeld is a node that has a filesystem and a block volume with a counter in
// a pod on them, and a router's stream to it.
type groupHeld struct {
	node      *harness.Driver
	fleet     *harness.Fleet
	counter   *groupCounter
	container string
	conn      *grpc.ClientConn
	stream    grpc.BidiStreamingClient[peerapi.CutRequest, peerapi.CutResponse]
}

// groupHold takes a node's part in a group as far as a phase.
func groupHold(t *testing.T, last peerapi.Phase) *groupHeld {
	t.Helper()
	f := harness.StartFleet(t, harness.FilePool("2Gi"))
	h := &groupHeld{node: f.Nodes[0], fleet: f}
	uid, container := groupPod(t)
	h.container = container
	members := []*groupMember{
		groupUse(t, f.Driver, h.node, "fs", "ext4", uid),
		groupUse(t, f.Driver, h.node, "raw", "block", uid),
	}
	h.counter = groupStart(t, container, members)
	own, err := peer.Load(filepath.Join(f.Dir, "tls"))
	dataMust(t, err)
	h.conn, err = grpc.NewClient(f.Address(0), grpc.WithTransportCredentials(credentials.NewTLS(own.Client(h.node.Node))))
	dataMust(t, err)
	t.Cleanup(func() { h.conn.Close() })
	h.stream, err = peerapi.NewGroupsClient(h.conn).Cut(context.Background())
	dataMust(t, err)
	volumes := groupRequest("g", members).GetSourceVolumeIds()
	for phase := peerapi.Phase_PHASE_BEGIN; phase <= last; phase++ {
		_, err := h.step(&peerapi.CutRequest{Phase: phase, Group: &peerapi.Group{Name: "g", VolumeIds: volumes}, VolumeIds: volumes})
		dataMust(t, err)
	}
	return h
}

func (h *groupHeld) step(r *peerapi.CutRequest) (*peerapi.CutResponse, error) {
	if err := h.stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return h.stream.Recv()
}

// mustBeHeld fails the test unless the writers are held.
func (h *groupHeld) mustBeHeld(t *testing.T) {
	t.Helper()
	if !groupFrozen(t, h.container) {
		t.Error("the pod is not stopped")
	}
	marks, err := filepath.Glob(filepath.Join(dataPool(h.node), ".staging", "*-*"))
	dataMust(t, err)
	if len(marks) < 2 {
		t.Errorf("for a crash there are only the marks %v", marks)
	}
}

// mustBeFree fails the test unless the writers go on soon, and nothing is left.
func (h *groupHeld) mustBeFree(t *testing.T) {
	t.Helper()
	h.counter.progress(t, 4)
	if groupFrozen(t, h.container) {
		t.Error("the pod is still stopped")
	}
	ctlEmptied(t, dataPool(h.node))
	if got := groupSnapshots(t, h.node); len(got) > 0 {
		t.Errorf("there is %v", got)
	}
}

func TestGroupIsUndoneWhen(t *testing.T) {
	for _, c := range []struct {
		what string
		last peerapi.Phase
		do   func(t *testing.T, h *groupHeld)
	}{
		{"the router dies while writers are held", peerapi.Phase_PHASE_HOLD, func(t *testing.T, h *groupHeld) { dataMust(t, h.conn.Close()) }},
		{"the router dies when all is cut", peerapi.Phase_PHASE_CUT, func(t *testing.T, h *groupHeld) { dataMust(t, h.conn.Close()) }},
		{"the router dies before the snapshots are confirmed", peerapi.Phase_PHASE_PLACE, func(t *testing.T, h *groupHeld) { dataMust(t, h.conn.Close()) }},
		{"the router gives it up", peerapi.Phase_PHASE_HOLD, func(t *testing.T, h *groupHeld) {
			dataMust(t, h.stream.CloseSend())
			if _, err := h.stream.Recv(); status.Code(err) != codes.Canceled {
				t.Errorf("the node says %v", err)
			}
		}},
		{"the driver is killed while writers are held", peerapi.Phase_PHASE_HOLD, func(_ *testing.T, h *groupHeld) { h.node.Kill(); h.node.Start() }},
		{"the driver is killed when all is cut", peerapi.Phase_PHASE_CUT, func(_ *testing.T, h *groupHeld) { h.node.Kill(); h.node.Start() }},
		{"the driver is killed before the snapshots are confirmed", peerapi.Phase_PHASE_PLACE, func(_ *testing.T, h *groupHeld) { h.node.Kill(); h.node.Start() }},
	} {
		t.Run(c.what, func(t *testing.T) {
			h := groupHold(t, c.last)
			if c.last != peerapi.Phase_PHASE_PLACE {
				h.mustBeHeld(t)
			}
			c.do(t, h)
			h.mustBeFree(t)
			// And it can be made.
			dataEventually(t, func() error {
				_, err := groupCreate(h.fleet.Driver, "g", ctlIDs(t, h.fleet.Driver)...)
				return err
			})
		})
	}
}

func TestGroupThatIsHeldTooLongIsLetGoAndFails(t *testing.T) {
	h := groupHold(t, peerapi.Phase_PHASE_CUT)
	h.mustBeHeld(t)
	h.counter.progress(t, 4) // by and by
	_, err := h.step(&peerapi.CutRequest{Phase: peerapi.Phase_PHASE_CHECK})
	ctlWant(t, "a hold that did not last", err, codes.DeadlineExceeded)
	h.mustBeFree(t)
}

// A driver that is told to end has 30 seconds for the calls in flight. Writers
// do not wait for so long, and nothing stays frozen when it has ended.
func TestGroupIsLetGoWhenTheDriverEnds(t *testing.T) {
	h := groupHold(t, peerapi.Phase_PHASE_HOLD)
	h.mustBeHeld(t)
	dataMust(t, syscall.Kill(h.node.Pid(), syscall.SIGTERM))
	h.counter.progress(t, 4)
	h.node.Kill()
	h.counter.progress(t, 4)
	if groupFrozen(t, h.container) {
		t.Error("the pod is still stopped")
	}
}

func TestGroupAcrossNodesFailsAsAWhole(t *testing.T) {
	f := threeNodes(t)
	uid, container := groupPod(t)
	members := []*groupMember{
		groupUse(t, f.Driver, f.Nodes[0], "a", "ext4", uid),
		groupUse(t, f.Driver, f.Nodes[1], "b", "ext4", uid),
		groupUse(t, f.Driver, f.Nodes[2], "c", "ext4", uid),
	}
	counter := groupStart(t, container, members)
	nothing := func(nodes ...*harness.Driver) {
		t.Helper()
		for _, n := range nodes {
			if got := groupSnapshots(t, n); len(got) > 0 {
				t.Errorf("%s has %v", n.Node, got)
			}
			ctlEmptied(t, dataPool(n))
		}
	}
	t.Run("a node is down", func(t *testing.T) {
		f.Nodes[2].Stop()
		_, err := f.CreateVolumeGroupSnapshot(f.Context(), groupRequest("g", members))
		ctlWant(t, "a node that is down", err, codes.Unavailable, "node-3")
		nothing(f.Nodes[:2]...)
		counter.progress(t, 6)
		f.Nodes[2].Start()
		dataEventually(t, func() error {
			_, err := f.ControllerGetVolume(f.Context(), &csi.ControllerGetVolumeRequest{VolumeId: members[2].id})
			return err
		})
	})
	t.Run("a node hangs while the others hold", func(t *testing.T) {
		// A process that has stopped answers nothing, and keeps its connection.
		dataMust(t, syscall.Kill(f.Nodes[2].Pid(), syscall.SIGSTOP))
		ctx, cancel := context.WithTimeout(f.Context(), 3*time.Second)
		defer cancel()
		_, err := f.CreateVolumeGroupSnapshot(ctx, groupRequest("g", members))
		if code := status.Code(err); code != codes.DeadlineExceeded && code != codes.Unavailable {
			t.Errorf("%v", err)
		}
		dataMust(t, syscall.Kill(f.Nodes[2].Pid(), syscall.SIGCONT))
		counter.progress(t, 6)
		nothing(f.Nodes...)
	})
	t.Run("and is made when all are well", func(t *testing.T) {
		var g *csi.VolumeGroupSnapshot
		dataEventually(t, func() error {
			r, err := f.CreateVolumeGroupSnapshot(f.Context(), groupRequest("g", members))
			g = r.GetGroupSnapshot()
			return err
		})
		if v := groupViolation(groupValues(t, g, members)); v != "" {
			t.Error(v)
		}
		groupDelete(t, f.Driver, g)
	})
}

// What a snapshot of a group has can be used: it is restored and read through
// its filesystem.
func TestGroupIsRestored(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	members, counter := groupSetUp(t, d, []*harness.Driver{d, d, d}, []string{"ext4", "xfs", "block"})
	counter.progress(t, 30)
	r, err := d.CreateVolumeGroupSnapshot(d.Context(), groupRequest("g", members))
	dataMust(t, err)
	want := groupValues(t, r.GetGroupSnapshot(), members)
	for i, kind := range []string{"ext4", "xfs", "block"} {
		s := r.GetGroupSnapshot().GetSnapshots()[slices.IndexFunc(r.GetGroupSnapshot().GetSnapshots(), func(s *csi.Snapshot) bool { return s.GetSourceVolumeId() == members[i].id })]
		capability, file := harness.Mount(kind, harness.Writer), "counter"
		if kind == "block" {
			capability, file = harness.Block(harness.Writer), ""
		}
		name := fmt.Sprintf("restored-%d", i)
		v := d.Create(name, 0, capability, harness.FromSnapshot(s.GetSnapshotId()))
		target := d.Use(name, v.GetVolumeId(), capability)
		f, err := os.Open(filepath.Join(target, file))
		dataMust(t, err)
		record := make([]byte, 8)
		_, err = io.ReadFull(f, record)
		f.Close()
		dataMust(t, err)
		if got := groupNumber(record); got != want[i] {
			t.Errorf("%s: restored is %d, the snapshot has %d", kind, got, want[i])
		}
		d.Release(name, v.GetVolumeId())
	}
	if v := groupViolation(want); v != "" {
		t.Error(v)
	}
}
