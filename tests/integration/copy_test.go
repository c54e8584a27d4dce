//go:build integration

package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/harness"
)

// copyFleet starts nodes with a pool each, and a router.
func copyFleet(t *testing.T, nodes int, arguments ...string) *harness.Fleet {
	t.Helper()
	configs := make([]string, nodes)
	for i := range configs {
		configs[i] = harness.FilePool("4Gi")
	}
	f := harness.StartFleet(t, configs...)
	if len(arguments) > 0 {
		for _, n := range f.Nodes {
			n.Args = append(n.Args, arguments...)
			n.Restart()
		}
	}
	return f
}

// copyCreate asks for a volume until it is there, as a provisioner does, with
// calls of that length. It gives the messages of the answers on the way.
func copyCreate(t *testing.T, f *harness.Fleet, name string, c *csi.VolumeCapability, each time.Duration, more ...func(*csi.CreateVolumeRequest)) (v *csi.Volume, answers []string) {
	t.Helper()
	r := &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{c}}
	for _, change := range more {
		change(r)
	}
	deadline := time.Now().Add(3 * time.Minute)
	for time.Now().Before(deadline) {
		ctx, cancel := context.WithTimeout(t.Context(), each)
		response, err := f.CreateVolume(ctx, r)
		cancel()
		switch status.Code(err) {
		case codes.OK:
			return response.GetVolume(), answers
		case codes.Aborted, codes.DeadlineExceeded, codes.Unavailable:
			answers = append(answers, err.Error())
		default:
			t.Fatalf("CreateVolume %s: %v", name, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("volume %s is not there after three minutes; answers: %s", name, strings.Join(answers, "\n"))
	return nil, nil
}

// copyGone waits until a pool of a node has nothing on its way, and no room is
// promised for anything.
func copyGone(t *testing.T, n *harness.Driver, free int64) {
	t.Helper()
	ctlEmptied(t, dataPool(n))
	if now := copyRoom(t, n); now != free {
		t.Errorf("%s has room for %d bytes, it had for %d", n.Node, now, free)
	}
}

func copyRoom(t *testing.T, n *harness.Driver) int64 {
	t.Helper()
	response, err := n.GetCapacity(n.Context(), &csi.GetCapacityRequest{})
	ctlMust(t, err)
	return response.GetAvailableCapacity()
}

func TestAVolumeIsRestoredAndClonedOnAnyNode(t *testing.T) {
	f := copyFleet(t, 3)
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			name := strings.ReplaceAll(kind.name, " ", "-")
			source := f.Create(name, kind.size, kind.capability, onNode("node-1")).GetVolumeId()
			file := kind.file(f.Nodes[0].Use(name, source, kind.capability))
			sum := dataFill(t, file, 4*dataMiB)
			snapshot := f.Snapshot(name, source).GetSnapshotId()
			later := dataFill(t, file, 4*dataMiB)
			for i, n := range f.Nodes {
				for what, from := range map[string]struct {
					source func(*csi.CreateVolumeRequest)
					sum    uint32
				}{
					"restored": {harness.FromSnapshot(snapshot), sum}, // after the source was written again
					"clone":    {harness.FromVolume(source), later},   // while it is in use
				} {
					name := fmt.Sprintf("%s-%s-%d", name, what, i)
					v := f.Create(name, 0, kind.capability, onNode(n.Node), from.source)
					if got := routerNode(v); got != n.Node {
						t.Errorf("%s is on %s, and was wanted on %s", name, got, n.Node)
					}
					again := f.Create(name, 0, kind.capability, onNode(n.Node), from.source)
					if again.GetVolumeId() != v.GetVolumeId() {
						t.Errorf("a retry made %s beside %s", again.GetVolumeId(), v.GetVolumeId())
					}
					dataMustHold(t, kind.file(n.Use(name, v.GetVolumeId(), kind.capability)), 4*dataMiB, from.sum)
					n.Release(name, v.GetVolumeId())
					f.Delete(v.GetVolumeId())
				}
			}
			f.Nodes[0].Release(name, source)
			_, err := f.DeleteSnapshot(f.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
			ctlMust(t, err)
			f.Delete(source)
			for _, n := range f.Nodes { // also of the snapshots that were cut for clones
				dataMustHoldNothing(t, dataPool(n))
			}
		})
	}
}

func TestACopyIsAsSparseAsItsSource(t *testing.T) {
	f := copyFleet(t, 2)
	block := harness.Block(harness.Writer)
	source := f.Create("source", dataGiB, block, onNode("node-1")).GetVolumeId()
	device, err := os.OpenFile(f.Nodes[0].Use("source", source, block), os.O_WRONLY, 0)
	ctlMust(t, err)
	defer device.Close()
	written := make([]byte, 64<<10)
	for i := range written {
		written[i] = byte(i%251 + 1)
	}
	for offset := int64(0); offset < dataGiB; offset += dataGiB / 16 {
		_, err := device.WriteAt(written, offset)
		ctlMust(t, err)
	}
	ctlMust(t, device.Sync())
	snapshot := f.Snapshot("snapshot", source).GetSnapshotId()
	copied := f.Create("copied", 0, block, onNode("node-2"), harness.FromSnapshot(snapshot))
	var blocks [2]int64
	for i, image := range []string{dataImage(dataPool(f.Nodes[0]), source), dataImage(dataPool(f.Nodes[1]), copied.GetVolumeId())} {
		blocks[i] = dataBlocks(t, image)
	}
	if blocks[1] > blocks[0] {
		t.Errorf("the copy takes %d bytes, its source %d", blocks[1], blocks[0])
	}
}

// The connection and both ends are cut in the middle, again and again. What has
// arrived is not brought again, and there is one volume in the end.
func TestACopyThatIsCutOffGoesOnWhereItWas(t *testing.T) {
	const size = 96 * dataMiB
	f := copyFleet(t, 2, "--copy-bandwidth", "8Mi")
	block := harness.Block(harness.Writer)
	source := f.Create("source", 2*size, block, onNode("node-1")).GetVolumeId()
	sum := dataFill(t, f.Nodes[0].Use("source", source, block), size)
	snapshot := f.Snapshot("snapshot", source).GetSnapshotId()
	f.Nodes[0].Release("source", source)

	const most = 6 // so that it comes to an end however slow the machine
	var kills atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	var killer sync.WaitGroup
	killer.Go(func() {
		for kills.Load() < most {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Duration(2500+rand.IntN(1000)) * time.Millisecond):
				victim := f.Nodes[kills.Load()%2]
				victim.Kill()
				victim.Start()
				kills.Add(1)
			}
		}
	})
	defer killer.Wait()
	defer stop()
	v, answers := copyCreate(t, f, "copied", block, time.Second, onNode("node-2"), harness.FromSnapshot(snapshot))
	stop()
	killer.Wait()
	t.Logf("%d kills, %d answers on the way", kills.Load(), len(answers))
	if kills.Load() < 3 {
		t.Errorf("the copy was cut %d times only; it shows nothing", kills.Load())
	}
	if !strings.Contains(strings.Join(answers, "\n"), "is being copied from node node-1") {
		t.Errorf("no answer told of the progress: %s", strings.Join(answers, "\n"))
	}
	dataMustHold(t, f.Nodes[1].Use("copied", v.GetVolumeId(), block), size, sum)
	list, err := f.ListVolumes(f.Context(), &csi.ListVolumesRequest{})
	ctlMust(t, err)
	if len(list.GetEntries()) != 2 {
		t.Errorf("there are %d volumes; want the source and its copy", len(list.GetEntries()))
	}
}

func TestACopyThatNobodyAsksForIsDropped(t *testing.T) {
	f := copyFleet(t, 2, "--copy-bandwidth", "4Mi", "--copy-abandon-after", "2s")
	block := harness.Block(harness.Writer)
	source := f.Create("source", 256*dataMiB, block, onNode("node-1")).GetVolumeId()
	dataFill(t, f.Nodes[0].Use("source", source, block), 64*dataMiB)
	before := [2]int64{copyRoom(t, f.Nodes[0]), copyRoom(t, f.Nodes[1])}

	r := &csi.CreateVolumeRequest{Name: "clone", VolumeCapabilities: []*csi.VolumeCapability{block}}
	onNode("node-2")(r)
	harness.FromVolume(source)(r)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := f.CreateVolume(ctx, r)
	ctlWant(t, "a copy that takes longer than the call", err, codes.DeadlineExceeded)
	if now := copyRoom(t, f.Nodes[1]); now != before[1]-256*dataMiB {
		t.Errorf("while it is copied, there is room for %d of %d bytes", now, before[1])
	}
	snapshots, err := f.ListSnapshots(f.Context(), &csi.ListSnapshotsRequest{})
	ctlMust(t, err)
	if len(snapshots.GetEntries()) != 0 {
		t.Errorf("the snapshot that is only there for the copy is listed: %v", snapshots.GetEntries())
	}
	for i, n := range f.Nodes {
		deadline := time.Now().Add(time.Minute)
		for copyRoom(t, n) != before[i] && time.Now().Before(deadline) {
			time.Sleep(50 * time.Millisecond)
		}
		copyGone(t, n, before[i])
	}
	f.Nodes[0].Release("source", source)
	f.Delete(source)
	for _, n := range f.Nodes {
		dataMustHoldNothing(t, dataPool(n))
	}
}

// What a killed driver has copied is kept for the next try; if there is none, it
// goes.
func TestWhatACopyHasBroughtOutlivesTheDriverForAWhile(t *testing.T) {
	f := copyFleet(t, 2, "--copy-bandwidth", "8Mi", "--copy-abandon-after", "5s")
	block := harness.Block(harness.Writer)
	source := f.Create("source", 256*dataMiB, block, onNode("node-1")).GetVolumeId()
	dataFill(t, f.Nodes[0].Use("source", source, block), 64*dataMiB)
	snapshot := f.Snapshot("snapshot", source).GetSnapshotId()
	target := f.Nodes[1]
	free := copyRoom(t, target)
	r := &csi.CreateVolumeRequest{Name: "copied", VolumeCapabilities: []*csi.VolumeCapability{block}}
	onNode("node-2")(r)
	harness.FromSnapshot(snapshot)(r)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := f.CreateVolume(ctx, r)
	ctlWant(t, "a copy that takes longer than the call", err, codes.DeadlineExceeded)
	target.Kill()
	target.Start()
	if now := copyRoom(t, target); now != free-256*dataMiB {
		t.Errorf("after the restart there is room for %d of %d bytes: the copy's is not promised", now, free)
	}
	deadline := time.Now().Add(time.Minute)
	for copyRoom(t, target) != free && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	copyGone(t, target, free)
}

// The snapshot that a clone is copied from is gone, and is cut anew by the retry,
// after the source was written. The clone is of the later instant, all of it.
func TestAClonesCopyIsOfOneInstant(t *testing.T) {
	const size = 64 * dataMiB
	f := copyFleet(t, 2, "--copy-bandwidth", "8Mi")
	block := harness.Block(harness.Writer)
	source := f.Create("source", size, block, onNode("node-1")).GetVolumeId()
	device := f.Nodes[0].Use("source", source, block)
	dataFill(t, device, size)
	r := &csi.CreateVolumeRequest{Name: "clone", VolumeCapabilities: []*csi.VolumeCapability{block}}
	onNode("node-2")(r)
	harness.FromVolume(source)(r)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	_, err := f.CreateVolume(ctx, r)
	ctlWant(t, "a copy that takes longer than the call", err, codes.DeadlineExceeded)
	f.Nodes[1].Kill()
	id, err := pool.ParseID(source)
	ctlMust(t, err)
	id.Name = pool.NameFor(request.CopyName("clone"))
	if _, err := f.Nodes[0].GetSnapshot(f.Context(), &csi.GetSnapshotRequest{SnapshotId: id.String()}); err != nil {
		t.Fatalf("the snapshot that the clone is copied from: %v", err)
	}
	deadline := time.Now().Add(time.Minute)
	for { // the node notices that its reader is gone
		_, err = f.Nodes[0].DeleteSnapshot(f.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id.String()})
		if status.Code(err) != codes.Aborted || time.Now().After(deadline) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	ctlMust(t, err)
	later := dataFill(t, device, size)
	f.Nodes[1].Start()
	v, _ := copyCreate(t, f, "clone", block, 2*time.Second, onNode("node-2"), harness.FromVolume(source))
	dataMustHold(t, f.Nodes[1].Use("clone", v.GetVolumeId(), block), size, later)
}

func TestASourceInAnotherPoolOfTheNodeIsCopied(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	block, other := harness.Block(harness.Writer), harness.Parameters("pool", "other")
	source := d.Create("source", 64*dataMiB, block).GetVolumeId()
	device := d.Use("source", source, block)
	sum := dataFill(t, device, 8*dataMiB)
	snapshot := d.Snapshot("snapshot", source).GetSnapshotId()
	later := dataFill(t, device, 8*dataMiB)
	for name, from := range map[string]struct {
		source func(*csi.CreateVolumeRequest)
		sum    uint32
	}{
		"restored": {harness.FromSnapshot(snapshot), sum},
		"clone":    {harness.FromVolume(source), later},
	} {
		v := d.Create(name, 0, block, from.source, other)
		if _, err := os.Stat(dataImage(ctlFilePool(d, "other"), v.GetVolumeId())); err != nil {
			t.Errorf("%s is not in the pool that was asked for: %v", name, err)
		}
		dataMustHold(t, d.Use(name, v.GetVolumeId(), block), 8*dataMiB, from.sum)
		d.Release(name, v.GetVolumeId())
		d.Delete(v.GetVolumeId())
	}
	ctlEmptied(t, ctlFilePool(d, "other"))
	list, err := os.ReadDir(filepath.Join(ctlFilePool(d, "default"), "snapshots"))
	ctlMust(t, err)
	if len(list) != 1 {
		t.Errorf("%d snapshots are left; want the one that was asked for", len(list))
	}
}

// A node has the key to its own identity and to nothing else: with it, it may not
// call what the router calls, and reads of others what it has a ticket for.
func TestANodesCertificateAloneReadsNothing(t *testing.T) {
	f := copyFleet(t, 2)
	block := harness.Block(harness.Writer)
	source := f.Create("source", 64*dataMiB, block, onNode("node-1")).GetVolumeId()
	snapshot, other := f.Snapshot("snapshot", source).GetSnapshotId(), f.Snapshot("other", source).GetSnapshotId()

	load := func(dir string) *peer.Credentials {
		c, err := peer.Load(dir)
		ctlMust(t, err)
		return c
	}
	thief := load(filepath.Join(f.Nodes[1].Dir, "tls"))
	router := load(filepath.Join(f.Dir, "tls"))
	connection, err := grpc.NewClient(f.Address(0), grpc.WithTransportCredentials(credentials.NewTLS(thief.Client("node-1"))))
	ctlMust(t, err)
	defer connection.Close()

	_, err = csi.NewControllerClient(connection).ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	ctlWant(t, "a node asks for the list of volumes", err, codes.PermissionDenied, "node-2")
	_, err = csi.NewControllerClient(connection).DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: source})
	ctlWant(t, "a node deletes a volume", err, codes.PermissionDenied, "node-2")

	read := func(ticket []byte, err error) error {
		t.Helper()
		ctlMust(t, err)
		stream, err := peerapi.NewCopiesClient(connection).Read(t.Context(), &peerapi.ReadRequest{SnapshotId: snapshot, Ticket: ticket})
		ctlMust(t, err)
		_, err = stream.Recv()
		return err
	}
	soon := time.Now().Add(time.Minute)
	ctlWant(t, "no ticket", read(nil, nil), codes.PermissionDenied)
	ctlWant(t, "a ticket of its own making", read(thief.Sign(peer.Ticket{Snapshot: snapshot, Reader: "node-2", Expires: soon})), codes.PermissionDenied)
	ctlWant(t, "a ticket for another snapshot", read(router.Sign(peer.Ticket{Snapshot: other, Reader: "node-2", Expires: soon})), codes.PermissionDenied)
	ctlWant(t, "another node's ticket", read(router.Sign(peer.Ticket{Snapshot: snapshot, Reader: "node-3", Expires: soon})), codes.PermissionDenied)
	ctlWant(t, "a ticket that has expired", read(router.Sign(peer.Ticket{Snapshot: snapshot, Reader: "node-2", Expires: time.Now().Add(-time.Second)})), codes.PermissionDenied)
	ctlWant(t, "a good ticket", read(router.Sign(peer.Ticket{Snapshot: snapshot, Reader: "node-2", Expires: soon})), codes.OK)
}
