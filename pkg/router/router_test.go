package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/controller"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

func TestAVolumeIsMadeOnTheNodeThatIsPreferredOrHasMostRoom(t *testing.T) {
	for _, c := range []struct {
		rule  string
		rooms []int64
		with  []func(*csi.CreateVolumeRequest)
		want  string
	}{
		{"most room", []int64{2 * gib, 8 * gib, 4 * gib}, nil, "node-2"},
		{"most room of those allowed", []int64{2 * gib, 8 * gib, 4 * gib}, []func(*csi.CreateVolumeRequest){among("node-1", "node-3")}, "node-3"},
		{"the first that is preferred", []int64{2 * gib, 8 * gib, 4 * gib}, []func(*csi.CreateVolumeRequest){preferring("node-1", "node-3")}, "node-1"},
		{"the second, if the first is full", []int64{gib / 2, 8 * gib, 4 * gib}, []func(*csi.CreateVolumeRequest){preferring("node-1", "node-3")}, "node-3"},
		{"another, if all that are preferred are full: a wish is no demand", []int64{0, 8 * gib, 0}, []func(*csi.CreateVolumeRequest){preferring("node-1", "node-3")}, "node-2"},
		{"another, if the preferred one is not there", []int64{2 * gib, 8 * gib, 4 * gib}, []func(*csi.CreateVolumeRequest){preferring("node-9")}, "node-2"},
		{"the preferred one of those allowed", []int64{2 * gib, 8 * gib, 4 * gib}, []func(*csi.CreateVolumeRequest){among("node-1", "node-2"), preferring("node-1", "node-2")}, "node-1"},
	} {
		t.Run(c.rule, func(t *testing.T) {
			s, _, _ := startFleet(t, c.rooms...)
			if got := nodeOf(made(t, s, volume("v", c.with...))); got != c.want {
				t.Errorf("it is on %s, want %s", got, c.want)
			}
		})
	}
}

func TestNoRoomIsResourceExhaustedOnlyIfEveryNodeSaysSo(t *testing.T) {
	s, _, nodes := startFleet(t, gib/2, 3*gib, 2*gib)
	_, err := s.CreateVolume(t.Context(), volume("v", among("node-1")))
	wantCode(t, "the one node that is allowed is full", err, codes.ResourceExhausted)
	_, err = s.CreateVolume(t.Context(), volume("v", among("node-9")))
	wantCode(t, "the one node that is allowed is none", err, codes.ResourceExhausted)

	// The room that was told is taken before the volume is made.
	nodes[1].Before(func(ctx context.Context, method string) error {
		if method == "CreateVolume" && !request.ExistingOnly(ctx) {
			return status.Error(codes.ResourceExhausted, "another was faster")
		}
		return nil
	})
	if got := nodeOf(made(t, s, volume("v"))); got != "node-3" {
		t.Errorf("it is on %s; node-3 is the next best", got)
	}
	// What was deleted on a node that is full is just being freed, for which its
	// engine waits.
	nodes[0].Before(func(_ context.Context, method string) error {
		if method == "CreateVolume" {
			nodes[0].mu.Lock()
			defer nodes[0].mu.Unlock()
			nodes[0].room = 5 * gib
		}
		return nil
	})
	if got := nodeOf(made(t, s, volume("freed", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 5 * gib }))); got != "node-1" {
		t.Errorf("it is on %s; node-1 has got room", got)
	}
	nodes[0].Before(failing("none"))
	// One that may have room does not tell.
	nodes[1].Before(failing("GetCapacity"))
	_, err = s.CreateVolume(t.Context(), volume("large", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 3 * gib }))
	wantCode(t, "a node does not tell its room", err, codes.Unavailable)
	nodes[1].Before(func(context.Context, string) error { return nil })
	_, err = s.CreateVolume(t.Context(), volume("large", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 4 * gib }))
	wantCode(t, "all are full", err, codes.ResourceExhausted)
}

func TestNothingIsKnownOfAFleetThatIsNotKnown(t *testing.T) {
	s, d, _ := startFleet(t)
	_, err := s.CreateVolume(t.Context(), volume("v"))
	wantCode(t, "no node", err, codes.Unavailable)
	id := "node-1/" + pool.NewPoolID() + "/v"
	if _, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		t.Errorf("what is on no node is gone: %v", err)
	}
	d.err = errors.New("not yet read")
	_, err = s.CreateVolume(t.Context(), volume("v"))
	wantCode(t, "CreateVolume", err, codes.Unavailable)
	_, err = s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	wantCode(t, "DeleteVolume", err, codes.Unavailable)
	_, err = s.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	wantCode(t, "ListVolumes", err, codes.Unavailable)
}

func TestARetryFindsWhatTheFirstTryMade(t *testing.T) {
	s, _, nodes := startFleet(t, 2*gib, 3*gib, 4*gib)
	id := made(t, s, volume("v"))
	for _, r := range []*csi.CreateVolumeRequest{volume("v"), volume("v", among("node-1", "node-3")), volume("v", preferring("node-1"))} {
		if again := made(t, s, r); again != id {
			t.Errorf("%v: a retry made %s beside %s", r.GetAccessibilityRequirements(), again, id)
		}
	}
	_, err := s.CreateVolume(t.Context(), volume("v", func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 * gib }))
	wantCode(t, "a larger one of that name", err, codes.AlreadyExists)

	for what, fail := range map[string]error{
		"a node is down":     errUnavailable,
		"a node panics":      status.Error(codes.Internal, "it has a fault"),
		"a message is large": status.Error(codes.ResourceExhausted, "message larger than max"),
	} {
		nodes[0].Before(func(context.Context, string) error { return fail })
		if again := made(t, s, volume("v")); again != id {
			t.Errorf("%s: a retry made %s beside %s", what, again, id)
		}
		_, err = s.CreateVolume(t.Context(), volume("new"))
		wantCode(t, what+", and might have it", err, codes.Unavailable)
		made(t, s, volume("elsewhere-"+strings.ReplaceAll(what, " ", "-"), among("node-2"), func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 4096 }))
	}
}

// The scheduler chose one node, gave it up, and chose another: the volume must be
// where it says now, and what may be on the first is nobody's.
func TestARetryForAnotherNodeMakesTheVolumeThere(t *testing.T) {
	s, _, nodes := startFleet(t, 2*gib, 2*gib, 2*gib)
	first := made(t, s, volume("v", among("node-1"), preferring("node-1")))
	nodes[0].Before(failing()) // the first is down, and does not matter
	second := made(t, s, volume("v", among("node-2"), preferring("node-2")))
	if nodeOf(first) != "node-1" || nodeOf(second) != "node-2" {
		t.Errorf("%s, then %s", first, second)
	}
	if _, err := nodes[0].Volume("v"); err != nil {
		t.Errorf("the first is not removed on a guess: %v", err)
	}
}

func TestACallForANameInFlightIsAborted(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib)
	source := made(t, s, volume("source"))
	arrived, leave := make(chan struct{}, 2), make(chan struct{})
	nodes[0].Before(func(ctx context.Context, method string) error {
		if strings.HasPrefix(method, "Create") && !request.ExistingOnly(ctx) {
			arrived <- struct{}{}
			<-leave
		}
		return nil
	})
	ended := make(chan error, 2)
	go func() {
		_, err := s.CreateVolume(context.Background(), volume("v"))
		ended <- err
	}()
	go func() {
		_, err := s.CreateSnapshot(context.Background(), &csi.CreateSnapshotRequest{Name: "v", SourceVolumeId: source})
		ended <- err
	}()
	<-arrived
	<-arrived
	_, err := s.CreateVolume(t.Context(), volume("v", among("node-2")))
	wantCode(t, "CreateVolume of the same name for another node", err, codes.Aborted)
	_, err = s.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "v", SourceVolumeId: source})
	wantCode(t, "CreateSnapshot of the same name", err, codes.Aborted)
	made(t, s, volume("other", among("node-2")))
	close(leave)
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if got := nodeOf(made(t, s, volume("v"))); got != "node-1" {
		t.Errorf("it is on %s", got)
	}
}

func TestDeadlinesAndCancellationGoThrough(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib)
	v := made(t, s, volume("v", among("node-1")))
	gone := make(chan error, 10)
	nodes[0].Before(func(ctx context.Context, _ string) error {
		<-ctx.Done()
		gone <- ctx.Err()
		return status.FromContextError(ctx.Err()).Err()
	})
	for what, call := range map[string]func(context.Context) error{
		"CreateVolume on one": func(ctx context.Context) error {
			_, err := s.CreateVolume(ctx, volume("w", among("node-1")))
			return err
		},
		"CreateVolume on any": func(ctx context.Context) error { _, err := s.CreateVolume(ctx, volume("w")); return err },
		"DeleteVolume": func(ctx context.Context) error {
			_, err := s.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v})
			return err
		},
		"ListVolumes": func(ctx context.Context) error { _, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{}); return err },
		"ListVolumes in pages": func(ctx context.Context) error {
			_, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 5})
			return err
		},
		"GetCapacity": func(ctx context.Context) error { _, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{}); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		err := call(ctx)
		cancel()
		wantCode(t, what+" with a deadline", err, codes.DeadlineExceeded)
		if err := <-gone; err == nil {
			t.Errorf("%s: the node was not told", what)
		}
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(300*time.Millisecond, cancel)
		wantCode(t, what+" that is given up", call(ctx), codes.Canceled)
		if err := <-gone; err == nil {
			t.Errorf("%s: the node was not told", what)
		}
	}
}

func TestANodeThatHangsEndsNoListForEver(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib)
	made(t, s, volume("v", among("node-2")))
	nodes[0].Before(func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() })
	begin := time.Now()
	_, err := s.ListVolumes(context.Background(), &csi.ListVolumesRequest{})
	wantCode(t, "ListVolumes without a deadline", err, codes.Unavailable)
	if err == nil || !strings.Contains(err.Error(), "node-1") {
		t.Errorf("%v does not name the node", err)
	}
	if took := time.Since(begin); took < patience/2 || took > 6*patience {
		t.Errorf("it took %s", took)
	}
}

func TestADiskThatMovedIsFoundThoughItsFirstNodeIsThere(t *testing.T) {
	s, d, nodes := startFleet(t, 4*gib, 2*gib, gib)
	v := made(t, s, volume("v", among("node-1")))
	snapshot, err := s.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v})
	if err != nil {
		t.Fatal(err)
	}
	id := snapshot.GetSnapshot().GetSnapshotId()
	// node-1 gets a new disk, its old one goes to node-3.
	nodes[0].server.Stop()
	nodes[2].server.Stop()
	first, third := startNode(t, "node-1", gib), &testNode{memory: nodes[2].memory}
	third.serve(t, "node-3", nodes[2].memory, nodes[0].memory)
	d.Set(first.Node, nodes[1].Node, third.Node)

	got, err := s.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v})
	if err != nil || got.GetVolume().GetVolumeId() != v {
		t.Errorf("the volume: %v, %v", got, err)
	}
	if got, err := s.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: id}); err != nil || got.GetSnapshot().GetSnapshotId() != id {
		t.Errorf("the snapshot: %v, %v", got, err)
	}
	for what, r := range map[string]*csi.ListSnapshotsRequest{"by ID": {SnapshotId: id}, "by volume": {SourceVolumeId: v}} {
		if list, err := s.ListSnapshots(t.Context(), r); err != nil || len(list.GetEntries()) != 1 {
			t.Errorf("the snapshot %s: %v, %v", what, list, err)
		}
	}
	restored := made(t, s, volume("restored", func(r *csi.CreateVolumeRequest) {
		r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	}))
	if _, err := nodes[0].Volume("restored"); err != nil {
		t.Errorf("%s is not beside its source: %v", restored, err)
	}
	// While node-2 does not answer, the pool is known to be elsewhere all the same.
	nodes[1].Before(failing())
	if _, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v}); err != nil {
		t.Error(err)
	}
	if _, err := nodes[0].Volume("v"); !errors.Is(err, pool.ErrNotFound) {
		t.Errorf("after its deletion: %v", err)
	}
	if list, err := s.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SourceVolumeId: v}); err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("the snapshot outlives its volume: %v, %v", list, err)
	}
	if _, err := s.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
		t.Error(err)
	}
	// That something is deleted already, its own node knows without the others.
	if _, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v}); err != nil {
		t.Error(err)
	}
	_, err = s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "node-1/" + pool.NewPoolID() + "/v"})
	wantCode(t, "a pool that may be on the node that does not answer", err, codes.Unavailable)
}

func TestANodeWhoseDriverDoesNotRunIsUnavailableAndNotGone(t *testing.T) {
	s, d, nodes := startFleet(t, 4*gib, 2*gib)
	v := made(t, s, volume("v", among("node-1")))
	d.Set(Node{Segment: "node-1"}, nodes[1].Node)
	_, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v})
	wantCode(t, "DeleteVolume", err, codes.Unavailable)
	_, err = s.CreateVolume(t.Context(), volume("w", among("node-1")))
	wantCode(t, "CreateVolume", err, codes.Unavailable)
	d.Set(nodes[1].Node)
	if _, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v}); err != nil {
		t.Errorf("of a node that is gone: %v", err)
	}
	d.Set(nodes[0].Node, nodes[1].Node) // and back
	if _, err := s.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v}); err != nil {
		t.Error(err)
	}
}

func TestANodeOfWhichTheRouterHasNotHeardYetIsNotGone(t *testing.T) {
	s, d, nodes := startFleet(t, 4*gib, 2*gib)
	v := made(t, s, volume("v", among("node-1")))
	d.Set(nodes[1].Node)
	d.late = []Node{nodes[0].Node}
	_, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v})
	wantCode(t, "DeleteVolume", err, codes.Unavailable)
	d.err = errors.New("no answer")
	d.late = nil
	_, err = s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v})
	wantCode(t, "DeleteVolume", err, codes.Unavailable)
	d.err = nil
	if _, err := s.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v}); err != nil {
		t.Error(err)
	}
}

func TestCapacityIsAddedUp(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib, gib)
	nodes[2].info.Name = "other"
	for _, c := range []struct {
		rule                string
		r                   *csi.GetCapacityRequest
		room, most, minimum int64
	}{
		{"of all", &csi.GetCapacityRequest{}, 7 * gib, 4 * gib, 4096},
		{"of those that have the pool", &csi.GetCapacityRequest{Parameters: map[string]string{"pool": "default"}}, 6 * gib, 4 * gib, 4096},
		{"of one", &csi.GetCapacityRequest{AccessibleTopology: topologies("node-2")[0]}, 2 * gib, 2 * gib, 4096},
		{"of one that there is not", &csi.GetCapacityRequest{AccessibleTopology: topologies("node-9")[0]}, 0, 0, 0},
	} {
		got, err := s.GetCapacity(t.Context(), c.r)
		if err != nil || got.GetAvailableCapacity() != c.room || got.GetMaximumVolumeSize().GetValue() != c.most || got.GetMinimumVolumeSize().GetValue() != c.minimum {
			t.Errorf("%s: %v, %v; want %d, at most %d, at least %d", c.rule, got, err, c.room, c.most, c.minimum)
		}
	}
}

// What a node's Controller service can do, the router can, and nothing else.
func TestTheRouterServesWhatANodeServes(t *testing.T) {
	s, _, nodes := startFleet(t, gib)
	node, err := controller.New(mustSet(t, nodes[0].memory), nobody{}, transfer.New(transfer.Options{}))
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	for _, m := range csi.Controller_ServiceDesc.Methods {
		implements := func(server csi.ControllerServer) bool {
			_, err := m.Handler(server, t.Context(), func(any) error { return nil }, nil)
			return status.Code(err) != codes.Unimplemented
		}
		if at, here := implements(node), implements(s); at != here {
			t.Errorf("%s: a node implements it: %t, the router: %t", m.MethodName, at, here)
		}
	}
}

func mustSet(t *testing.T, engines ...pool.Engine) *pool.Set {
	t.Helper()
	set, err := pool.NewSet("node-1", engines...)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestManyNodesAreListedInStablePagesAndAskedAtOnceWithinABound(t *testing.T) {
	const many, each = 200, 3
	rooms := slices.Repeat([]int64{100 * gib}, many)
	s, d, nodes := startFleet(t, rooms...)
	want := map[string]bool{}
	for i, n := range nodes {
		if i%7 == 0 { // some have nothing
			continue
		}
		for j := range each {
			v, err := n.CreateVolume(t.Context(), pool.VolumeSpec{RequestName: fmt.Sprintf("%s-%d", strings.Repeat("v", 60), j), Size: 4096})
			if err != nil {
				t.Fatal(err)
			}
			want[v.ID] = true
		}
	}
	whole, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if err != nil || len(whole.GetEntries()) != len(want) || whole.GetNextToken() != "" {
		t.Fatalf("%d of %d, token %q, %v", len(whole.GetEntries()), len(want), whole.GetNextToken(), err)
	}
	for _, size := range []int32{5, 100, int32(len(want)), 1000} {
		got, order, pages := map[string]bool{}, []string{}, 0
		for token := ""; ; pages++ {
			page, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: size, StartingToken: token})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.GetEntries() {
				got[e.GetVolume().GetVolumeId()] = true
				order = append(order, e.GetVolume().GetVolumeId())
			}
			token = page.GetNextToken()
			if len(token) > 128 {
				t.Fatalf("a token of %d bytes; CSI allows 128", len(token))
			}
			if token == "" {
				break
			}
			if len(page.GetEntries()) != int(size) {
				t.Errorf("a page of %d for %d, and there is more", len(page.GetEntries()), size)
			}
			if pages%50 == 3 { // nodes without volumes come and go
				gone := nodes[0].Node
				d.Set(slices.DeleteFunc(allOf(nodes), func(n Node) bool { return n == gone && pages%100 == 3 })...)
			}
		}
		if len(got) != len(want) || len(order) != len(want) {
			t.Errorf("pages of %d: %d different of %d listed, want %d", size, len(got), len(order), len(want))
		}
		for i, e := range whole.GetEntries() {
			if order[i] != e.GetVolume().GetVolumeId() {
				t.Errorf("pages of %d: entry %d is %s, and %s in the whole list", size, i, order[i], e.GetVolume().GetVolumeId())
				break
			}
		}
	}
	d.Set(allOf(nodes)...)

	// All that may be asked at once are, and no more.
	arrived, leave := make(chan struct{}, many), make(chan struct{})
	for _, n := range nodes {
		n.Before(func(context.Context, string) error {
			arrived <- struct{}{}
			<-leave
			return nil
		})
	}
	ended := make(chan error, 1)
	go func() {
		_, err := s.GetCapacity(context.Background(), &csi.GetCapacityRequest{})
		ended <- err
	}()
	soon(t, "as many are asked as may be", func() bool { return len(arrived) >= atOnce })
	time.Sleep(50 * time.Millisecond) // for one too many to come
	if n := len(arrived); n != atOnce {
		t.Errorf("%d nodes are asked at once, want %d", n, atOnce)
	}
	close(leave)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func allOf(nodes []*testNode) (all []Node) {
	for _, n := range nodes {
		all = append(all, n.Node)
	}
	return all
}

func TestATokenThatNoRouterGaveOutIsRefused(t *testing.T) {
	s, _, _ := startFleet(t, gib, gib)
	good := makeToken("node-1", "")
	for _, token := range []string{"x", "nonsense", "invalid-token", "invalid-token-of-some-length", strings.Repeat("A", 10_000), good + "=", good[1:], good[:len(good)-1], "\x00", "é"} {
		_, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token})
		wantCode(t, fmt.Sprintf("%.40q", token), err, codes.Aborted)
	}
	if _, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: good}); err != nil {
		t.Error(err)
	}
}

func TestANodesAnswerMayBeLargerThanTheLibraryExpects(t *testing.T) {
	s, _, nodes := startFleet(t, 1<<50)
	for i := range 3000 {
		if _, err := nodes[0].CreateVolume(t.Context(), pool.VolumeSpec{
			RequestName: fmt.Sprintf("v-%d", i), Size: 4096, Source: pool.Source{SnapshotID: strings.Repeat("s", 2000)},
		}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 3000 {
		t.Errorf("%d, %v", len(list.GetEntries()), err)
	}
}
