//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// floodStatus reads a number of proc_pid_status(5) of a driver.
func floodStatus(t *testing.T, d *harness.Driver, name string) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Pid()))
	ctlMust(t, err)
	_, rest, _ := strings.Cut(string(text), name+":")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("no %s in %s", name, text)
	}
	n, err := strconv.ParseInt(fields[0], 10, 64)
	ctlMust(t, err)
	return n
}

// floodMemory is the most that a driver may take, in KiB.
func floodMemory() int64 {
	if harness.Race {
		return 2560 << 10 // the detector takes several times what the driver does
	}
	return 512 << 10
}

// Ten thousand calls at once, while the disk answers none: the driver takes so
// many and refuses the rest at once, so that neither memory nor threads run out.
// It goes on telling that it is there, and when the disk goes on, each call that
// was taken ends, and each that was refused can be repeated.
func TestTenThousandCallsInFlightDoNoHarm(t *testing.T) {
	const calls = 10_000
	d := harness.Start(t, harness.FilePool("4Gi"))
	thaw := ctlFrozen(t, ctlFilePool(d, "default"))
	var ended, refused atomic.Int64
	var everyone sync.WaitGroup
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	results := make([]error, calls)
	for i := range calls {
		everyone.Go(func() {
			_, results[i] = d.CreateVolume(ctx, ctlRequest(fmt.Sprintf("v-%d", i), ctlRequired(4096)))
			if status.Code(results[i]) == codes.Unavailable {
				refused.Add(1)
			}
			ended.Add(1)
		})
	}
	for refused.Load() < calls-2000 {
		if ctx.Err() != nil {
			t.Fatalf("%d calls are refused", refused.Load())
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := ended.Load(); n != refused.Load() {
		t.Errorf("%d calls have ended, and %d of them were refused", n, refused.Load())
	}
	probe, err := d.Probe(d.Context(), &csi.ProbeRequest{})
	if err != nil || !probe.GetReady().GetValue() {
		t.Errorf("Probe: %v, %v", probe, err)
	}
	memory, threads := floodStatus(t, d, "VmRSS"), floodStatus(t, d, "Threads")
	t.Logf("%d KiB, %d threads", memory, threads)
	if memory > floodMemory() || threads > 4000 {
		t.Errorf("the driver takes %d KiB and %d threads", memory, threads)
	}
	thaw()
	everyone.Wait()
	made := 0
	for i, err := range results {
		switch status.Code(err) {
		case codes.OK:
			made++
		case codes.Unavailable:
			if !strings.Contains(err.Error(), "in flight") {
				t.Fatalf("call %d: %v", i, err)
			}
		default:
			t.Fatalf("call %d: %v", i, err)
		}
	}
	if got := len(ctlIDs(t, d)); got != made || made == 0 {
		t.Errorf("%d calls were answered with OK, and %d volumes are listed", made, got)
	}
	for i, err := range results {
		if err != nil {
			_, err := ctlCreates(d, fmt.Sprintf("v-%d", i), ctlRequired(4096)).call()
			ctlWant(t, "a call that was refused", err, codes.OK)
			break
		}
	}
}

// However many ask for one thing at once, there is one, or none.
func TestManyCallsForOneNameMakeOneVolume(t *testing.T) {
	const callers = 100
	d := harness.Start(t, harness.FilePool("1Gi"))
	room := ctlRoom(t, d, "default")
	all := func(rule string, call func() error) {
		t.Helper()
		var everyone sync.WaitGroup
		var done atomic.Int64
		for range callers {
			everyone.Go(func() {
				switch err := call(); status.Code(err) {
				case codes.OK:
					done.Add(1)
				case codes.Aborted:
				default:
					t.Errorf("%s: %v", rule, err)
				}
			})
		}
		everyone.Wait()
		if done.Load() == 0 {
			t.Errorf("%s: nobody was answered with OK", rule)
		}
	}
	for range 2 {
		all("CreateVolume", func() error { _, err := ctlCreates(d, "v").call(); return err })
		ids := ctlIDs(t, d)
		if len(ids) != 1 {
			t.Fatalf("there are %v", ids)
		}
		all("CreateSnapshot", func() error { _, err := ctlSnaps(d, "s", ids[0]).call(); return err })
		all("NodeStageVolume", func() error { _, err := ctlStages(d, ids[0]).call(); return err })
		if loops := dataLoops(t, dataPool(d)); len(loops) != 1 {
			t.Errorf("it is attached to %v", loops)
		}
		all("NodeUnstageVolume", func() error { _, err := ctlUnstages(d, ids[0]).call(); return err })
		snapshots, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{})
		ctlMust(t, err)
		if len(snapshots.GetEntries()) != 1 {
			t.Fatalf("there are %v", snapshots)
		}
		id := snapshots.GetEntries()[0].GetSnapshot().GetSnapshotId()
		all("DeleteSnapshot", func() error { _, err := ctlDeletesSnapshot(d, id).call(); return err })
		all("DeleteVolume", func() error { _, err := ctlDeletes(d, ids[0]).call(); return err })
		dataMustHoldNothing(t, dataPool(d))
	}
	ctlRoomSoon(t, d, "default", room)
}

// What is larger than any request has to be is refused, however often it comes,
// and none of it is kept.
func TestHugeRequestsAreRefused(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	before := ctlState(t, d, "default")
	many := map[string]string{}
	for i := range 10_000 {
		many[fmt.Sprintf("key-%d", i)] = "value"
	}
	topologies := make([]*csi.Topology, 10_000)
	for i := range topologies {
		topologies[i] = ctlNode(fmt.Sprintf("node-%d", i+2))
	}
	capabilities := make([]*csi.VolumeCapability, 20_000)
	for i := range capabilities {
		capabilities[i] = harness.Block(harness.Writer)
	}
	long := strings.Repeat("x", 3<<20)
	with := func(change func(*csi.CreateVolumeRequest)) *csi.CreateVolumeRequest {
		return ctlRequest("v", func(r *csi.CreateVolumeRequest) { change(r) })
	}
	var everyone sync.WaitGroup
	for rule, c := range map[string]struct {
		request *csi.CreateVolumeRequest
		want    []codes.Code
	}{
		"a map of 10,000 entries": {with(func(r *csi.CreateVolumeRequest) { r.Parameters = many }), []codes.Code{codes.InvalidArgument}},
		"a value of 3 MiB":        {with(func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"pool": long} }), []codes.Code{codes.InvalidArgument}},
		"a key of 3 MiB":          {with(func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{long: "x"} }), []codes.Code{codes.InvalidArgument}},
		"secrets of 3 MiB":        {with(func(r *csi.CreateVolumeRequest) { r.Secrets = map[string]string{"x": long} }), []codes.Code{codes.InvalidArgument}},
		"a name of 3 MiB":         {with(func(r *csi.CreateVolumeRequest) { r.Name = long }), []codes.Code{codes.InvalidArgument}},
		"10,000 other nodes": {with(func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: topologies}
		}), []codes.Code{codes.ResourceExhausted}},
		"a message of 8 MiB": {with(func(r *csi.CreateVolumeRequest) { r.Name = long + long + long }), []codes.Code{codes.ResourceExhausted}},
		"a source of 3 MiB":  {with(harness.FromVolume(long)), []codes.Code{codes.NotFound, codes.InvalidArgument}},
		"20,000 times a capability": {with(func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = capabilities
			r.Parameters = map[string]string{"no": "such"}
		}), []codes.Code{codes.InvalidArgument}},
	} {
		everyone.Go(func() {
			for range 2 {
				_, err := d.CreateVolume(d.Context(), c.request)
				got, wanted := status.Code(err), false
				for _, code := range c.want {
					wanted = wanted || got == code
				}
				if message := status.Convert(err).Message(); !wanted || len(message) > 4096 {
					t.Errorf("%s: %s and %d bytes that begin with %.200q; want %v", rule, got, len(message), message, c.want)
				}
			}
		})
	}
	everyone.Wait()
	if memory := floodStatus(t, d, "VmHWM"); memory > floodMemory() {
		t.Errorf("the driver took %d KiB", memory)
	}
	ctlSame(t, "after all that", before, ctlState(t, d, "default"))
}

// Who can write in the kubelet's directory, and puts a link in the place of a
// directory again and again while volumes come and go, leads the driver nowhere:
// nothing is ever mounted, made or removed where the link leads.
func TestALinkThatComesAndGoesInTheKubeletsDirectoryLeadsNowhere(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	canary := filepath.Join(d.Dir, "canary")
	ctlMust(t, os.MkdirAll(filepath.Join(canary, "empty"), 0o700))
	ctlMust(t, os.WriteFile(filepath.Join(canary, "file"), []byte("canary"), 0o600))
	before := ctlTree(t, canary)
	v := nodeCreate(d, "v", dataKinds[0])
	staging, target := d.Staging("v"), d.Target("v")
	stop := make(chan struct{})
	var attacker sync.WaitGroup
	attacker.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			place := []string{staging, target}[i%2]
			_ = os.Remove(place) // fails while something is mounted there
			_ = os.Symlink([]string{canary, filepath.Join(canary, "empty")}[i/2%2], place)
			time.Sleep(time.Duration(i%5) * time.Millisecond)
			if info, err := os.Lstat(place); err == nil && info.Mode()&os.ModeSymlink != 0 {
				_ = os.Remove(place)
			}
			_ = os.Mkdir(staging, 0o700)
		}
	})
	// What nodeVolume does would make the directory that the attacker removes.
	stage := func() error {
		_, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: staging, VolumeCapability: v.kind.capability})
		return err
	}
	publish := func() error {
		_, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: v.kind.capability,
		})
		return err
	}
	unstage := func() error {
		_, err := d.NodeUnstageVolume(d.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: staging})
		return err
	}
	mounted := 0
	for range dataRounds(t, 50) {
		if stage() == nil {
			mounted++
			if publish() == nil {
				_ = v.unpublish(target)
			}
		}
		mounts, err := filesystem.Mounts()
		ctlMust(t, err)
		for _, m := range mounts {
			if strings.HasPrefix(m.Path, canary) {
				t.Fatalf("mounted where a link leads: %s", m.Path)
			}
		}
		_ = unstage()
	}
	close(stop)
	attacker.Wait()
	t.Logf("it was staged %d times", mounted)
	ctlSame(t, "where the links lead", before, ctlTree(t, canary))
	for _, place := range []string{staging, target} {
		if info, err := os.Lstat(place); err == nil && info.Mode()&os.ModeSymlink != 0 {
			ctlMust(t, os.Remove(place))
		}
	}
	dataEventually(t, func() error { return v.unpublish(target) })
	dataEventually(t, unstage)
	dataMustBeIdle(t, d, dataPool(d))
	d.Staging("v")
	ctlMust(t, v.stage())
	ctlMust(t, v.publish())
	d.Release("v", v.id)
	d.Delete(v.id)
}
