//go:build integration

package integration

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlStalled is a driver on a pool whose filesystem can be frozen, so that what
// the driver does there takes as long as a test needs.
type ctlStalled struct {
	*harness.Driver
	mountPoint string
	pool       string // its directory
}

// ctlStalls starts a driver on a pool that shares blocks, or on one that copies.
// Its log tells when a call begins.
func ctlStalls(t *testing.T, reflink bool) ctlStalled {
	t.Helper()
	var d *harness.Driver
	s := ctlStalled{}
	if reflink {
		d = harness.New(t, harness.FilePool("1Gi"))
		s.pool = ctlFilePool(d, "default")
		s.mountPoint = s.pool
	} else {
		s.pool = ctlExt4(t, ctlGiB)
		s.mountPoint = filepath.Dir(s.pool)
		d = harness.New(t, harness.DirectoryPool(s.pool))
	}
	s.Driver = d
	d.Args = []string{"-v", "5"}
	d.Start()
	return s
}

// begin makes a call in the background while the pool is frozen, and returns
// when the driver is at it.
func (s ctlStalled) begin(t *testing.T, c ctlCall) (result func() error) {
	t.Helper()
	method, subject, _ := strings.Cut(c.name, " ")
	seen := len(s.Log())
	done := make(chan error, 1)
	go func() {
		_, err := c.call()
		done <- err
	}()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		log := s.Log()[seen:]
		if i := strings.Index(log, `"Call begins" method="/csi.v1.Controller/`+method); i >= 0 && strings.Contains(log[i:], subject) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not begin", c.name)
		}
	}
	time.Sleep(100 * time.Millisecond) // from the log's line to the disk
	select {
	case err := <-done:
		t.Fatalf("%s ended while its pool was frozen: %v", c.name, err)
	default:
	}
	return func() error { return <-done }
}

func ctlStages(d *harness.Driver, id string) ctlCall {
	return ctlCall{"NodeStageVolume " + id, func() (proto.Message, error) {
		return d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging("s"), VolumeCapability: harness.Block(harness.Writer)})
	}}
}

func ctlUnstages(d *harness.Driver, id string) ctlCall {
	return ctlCall{"NodeUnstageVolume " + id, func() (proto.Message, error) {
		return d.NodeUnstageVolume(d.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: d.Staging("s")})
	}}
}

func ctlPublishes(d *harness.Driver, id string) ctlCall {
	return ctlCall{"NodePublishVolume " + id, func() (proto.Message, error) {
		return d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
			VolumeId: id, StagingTargetPath: d.Staging("s"), TargetPath: d.Target("t"), VolumeCapability: harness.Block(harness.Writer),
		})
	}}
}

// What conflicts with a call in flight is Aborted at once. Everything else goes
// on.
func TestAConflictingCallIsAborted(t *testing.T) {
	for kind, reflink := range map[string]bool{"sharing": true, "copying": false} {
		t.Run(kind, func(t *testing.T) {
			s := ctlStalls(t, reflink)
			d := s.Driver
			block := harness.Block(harness.Writer)
			v := d.Create("v", 4*ctlMiB, block).GetVolumeId()
			d.Create("bystander", 4*ctlMiB, block)
			pool := strings.TrimSuffix(v, "v")
			d.Snapshot("s", v)
			gone := d.Create("gone", 4*ctlMiB, block).GetVolumeId()
			unsnapped := d.Snapshot("unsnapped", v).GetSnapshotId()
			for _, c := range []struct {
				inFlight  ctlCall
				conflicts []ctlCall
			}{
				{ctlCreates(d, "new"), []ctlCall{
					ctlCreates(d, "new"), ctlCreates(d, "new", ctlRequired(8*ctlMiB)), ctlDeletes(d, pool+"new"), ctlExpands(d, pool+"new", ctlMiB), ctlStages(d, pool+"new"),
				}},
				{ctlCreates(d, "copy", harness.FromVolume(v)), []ctlCall{
					ctlCreates(d, "copy", harness.FromVolume(v)), ctlDeletes(d, pool+"copy"),
					ctlDeletes(d, v), ctlExpands(d, v, 8*ctlMiB),
				}},
				{ctlCreates(d, "restored", harness.FromSnapshot(pool+"s")), []ctlCall{
					ctlCreates(d, "restored", harness.FromSnapshot(pool+"s")), ctlDeletesSnapshot(d, pool+"s"),
				}},
				{ctlSnaps(d, "s2", v), []ctlCall{
					ctlSnaps(d, "s2", v), ctlDeletesSnapshot(d, pool+"s2"), ctlCreates(d, "early", harness.FromSnapshot(pool+"s2")),
					ctlDeletes(d, v), ctlExpands(d, v, 8*ctlMiB),
				}},
				{ctlExpands(d, v, 8*ctlMiB), []ctlCall{
					ctlExpands(d, v, 8*ctlMiB), ctlExpands(d, v, 12*ctlMiB), ctlDeletes(d, v), ctlSnaps(d, "s3", v), ctlCreates(d, "copy3", harness.FromVolume(v)),
					ctlStages(d, v), ctlUnstages(d, v), ctlPublishes(d, v),
				}},
				{ctlDeletesSnapshot(d, unsnapped), []ctlCall{
					ctlDeletesSnapshot(d, unsnapped), ctlSnaps(d, "unsnapped", v), ctlCreates(d, "late", harness.FromSnapshot(unsnapped)),
				}},
				{ctlDeletes(d, gone), []ctlCall{
					ctlDeletes(d, gone), ctlCreates(d, "gone"), ctlExpands(d, gone, 8*ctlMiB), ctlSnaps(d, "s4", gone), ctlCreates(d, "copy4", harness.FromVolume(gone)),
					ctlStages(d, gone), ctlUnstages(d, gone), ctlPublishes(d, gone),
				}},
			} {
				thaw := ctlFrozen(t, s.mountPoint)
				result := s.begin(t, c.inFlight)
				conflicts := c.conflicts
				if strings.Contains(c.inFlight.name, "copy") || strings.Contains(c.inFlight.name, "s2") {
					if reflink { // two cuts would thaw each other's freeze
						conflicts = append(conflicts, ctlSnaps(d, "s5", v), ctlCreates(d, "copy5", harness.FromVolume(v)))
					} else { // nobody may write what is being copied
						conflicts = append(conflicts, ctlStages(d, v), ctlUnstages(d, v), ctlPublishes(d, v))
					}
				}
				for _, conflict := range conflicts {
					start := time.Now()
					_, err := conflict.call()
					ctlWant(t, conflict.name+" during "+c.inFlight.name, err, codes.Aborted, "repeat")
					if took := time.Since(start); took > 5*time.Second {
						t.Errorf("%s during %s was refused after %s", conflict.name, c.inFlight.name, took)
					}
				}
				// What only looks is not held up, nor held off.
				if ids := ctlIDs(t, d); len(ids) < 3 {
					t.Errorf("during %s there are %v", c.inFlight.name, ids)
				}
				ctlRoom(t, d, "default")
				_, err := d.ControllerGetVolume(d.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v})
				ctlWant(t, "ControllerGetVolume during "+c.inFlight.name, err, codes.OK)
				thaw()
				ctlWant(t, c.inFlight.name+" once the pool thawed", result(), codes.OK)
				_, err = c.inFlight.call()
				ctlWant(t, c.inFlight.name+" again", err, codes.OK)
			}
		})
	}
}

// Copies of one source do not hold each other up where nothing is frozen for
// them.
func TestOneVolumeCanBeCopiedTwiceAtOnce(t *testing.T) {
	s := ctlStalls(t, false)
	d := s.Driver
	v := d.Create("v", 4*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	thaw := ctlFrozen(t, s.mountPoint)
	results := map[string]func() error{}
	for _, c := range []ctlCall{ctlCreates(d, "one", harness.FromVolume(v)), ctlCreates(d, "two", harness.FromVolume(v)), ctlSnaps(d, "three", v)} {
		results[c.name] = s.begin(t, c)
	}
	thaw()
	for name, result := range results {
		ctlWant(t, name, result(), codes.OK)
	}
}

// A copy goes on when its caller has given up, and a retry finds it; there is
// never a second one.
func TestACopyOutlivesTheDeadlineOfItsCall(t *testing.T) {
	s := ctlStalls(t, false)
	d := s.Driver
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	data := filepath.Join(s.pool, "volumes", "v", "data")
	want := []byte(strings.Repeat("what is to be copied\n", 100_000))
	ctlMust(t, os.WriteFile(data, want, 0o600))
	ctlMust(t, os.Truncate(data, 16*ctlMiB))

	thaw := ctlFrozen(t, s.mountPoint)
	for name, request := range map[string]func(ctx context.Context) error{
		"copy": func(ctx context.Context) error {
			_, err := d.CreateVolume(ctx, ctlRequest("copy", harness.FromVolume(v)))
			return err
		},
		"snapshot": func(ctx context.Context) error {
			_, err := d.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snapshot", SourceVolumeId: v})
			return err
		},
	} {
		short, cancel := context.WithTimeout(d.Context(), 500*time.Millisecond)
		ctlWant(t, "the "+name+", in too short a time", request(short), codes.DeadlineExceeded)
		cancel()
		ctlWant(t, "the "+name+", again", request(d.Context()), codes.Aborted)
	}
	ctlWant(t, "the deletion of its source", func() error { _, err := ctlDeletes(d, v).call(); return err }(), codes.Aborted)
	thaw()

	var everyone sync.WaitGroup
	for _, c := range []ctlCall{ctlCreates(d, "copy", harness.FromVolume(v)), ctlSnaps(d, "snapshot", v)} {
		everyone.Go(func() {
			for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				_, err := c.call()
				if err == nil {
					return
				}
				if status.Code(err) != codes.Aborted || time.Now().After(end) {
					t.Errorf("%s, until it is there: %v", c.name, err)
					return
				}
			}
		})
	}
	everyone.Wait()
	ctlEmptied(t, s.pool)
	for _, file := range []string{"volumes/copy/data", "snapshots/snapshot/data"} {
		got, err := os.ReadFile(filepath.Join(s.pool, file))
		ctlMust(t, err)
		if int64(len(got)) != 16*ctlMiB || string(got[:len(want)]) != string(want) {
			t.Errorf("%s is not a copy", file)
		}
	}
	if late := strings.Count(d.Log(), `code="DeadlineExceeded"`); late != 2 {
		t.Errorf("the log tells of %d calls that were late, want 2", late)
	}
	before := ctlTree(t, s.pool)
	for _, c := range []ctlCall{ctlCreates(d, "copy", harness.FromVolume(v)), ctlSnaps(d, "snapshot", v)} {
		_, err := c.call()
		ctlWant(t, c.name+" once it is there", err, codes.OK)
	}
	ctlSame(t, "a retry of what is there", before, ctlTree(t, s.pool))
	if ids := ctlIDs(t, d); len(ids) != 2 {
		t.Errorf("volumes: %v, want the source and one copy", ids)
	}
}

// A staging that fails takes the device away again that a snapshot of the volume
// may just have found: it is repeated, and nothing else.
func TestASnapshotMeetsAStagingThatFails(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	block := harness.Block(harness.Writer)
	source := d.Create("source", 16*ctlMiB, block).GetVolumeId()
	f := ctlUse(t, d, "source", source)
	ctlFill(t, f, ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Release("source", source)
	v := d.Create("v", 16*ctlMiB, harness.Mount("ext4", harness.Writer), harness.FromVolume(source)).GetVolumeId()
	staging, stop, ended := d.Staging("v"), make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			_, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{VolumeId: v, StagingTargetPath: staging, VolumeCapability: harness.Mount("ext4", harness.Writer)})
			if code := status.Code(err); code != codes.FailedPrecondition && code != codes.Aborted {
				ended <- err
				return
			}
		}
	}()
	made := 0
	for deadline := time.Now().Add(time.Minute); made < 60 && time.Now().Before(deadline); {
		response, err := d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v})
		if status.Code(err) == codes.Aborted {
			continue
		}
		ctlMust(t, err)
		made++
		_, err = d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: response.GetSnapshot().GetSnapshotId()})
		ctlMust(t, err)
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Errorf("the staging that should fail: %v", err)
	}
	if made == 0 {
		t.Error("no snapshot was made")
	}
}
