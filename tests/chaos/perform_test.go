//go:build integration

package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/tests/chaos/model"
	"github.com/orlop-csi/orlop/tests/harness"
)

// perform does what an orchestrator does for an operation, and has the world be
// as it then must be.
func (r *run) perform(o model.Operation) error {
	switch o.Action {
	case model.Create:
		return r.create(o)
	case model.CreateTooLarge:
		_, err := ask(r, o, "CreateVolume", func(ctx context.Context) (*csi.CreateVolumeResponse, error) {
			return r.site.client().CreateVolume(ctx, r.createRequest(o))
		}, codes.ResourceExhausted)
		return mustBeRefused(err, codes.ResourceExhausted)
	case model.Delete:
		if err := r.deleteVolume(o, r.id(model.FactVolume+o.Volume)); err != nil {
			return err
		}
		r.apply(o)
		return nil
	case model.DeleteInUse:
		id := r.id(model.FactVolume + o.Volume)
		_, err := ask(r, o, "DeleteVolume", func(ctx context.Context) (*csi.DeleteVolumeResponse, error) {
			return r.site.client().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
		}, codes.FailedPrecondition)
		return mustBeRefused(err, codes.FailedPrecondition)
	case model.TakeSnapshot:
		return r.snapshot(o)
	case model.DeleteSnapshot:
		if err := r.deleteSnapshot(o, r.id(model.FactSnapshot+o.Snapshot)); err != nil {
			return err
		}
		r.apply(o)
		return nil
	case model.SnapshotGroup:
		return r.snapshotGroup(o)
	case model.DeleteGroup:
		r.fail(r.consistent(o.Group))
		if err := r.deleteGroup(o, r.membersOf(o.Group)); err != nil {
			return err
		}
		r.apply(o)
		return nil
	case model.Grow:
		return r.grow(o)
	case model.GrowDevice:
		return r.growDevice(o)
	case model.Stage:
		return r.stage(o)
	case model.Publish:
		return r.publish(o)
	case model.Unpublish:
		return r.unpublish(o)
	case model.Unstage:
		return r.unstage(o)
	case model.Write:
		return r.write(o)
	case model.List:
		return r.list(o)
	default:
		return fmt.Errorf("nobody knows how to %s", o.Action)
	}
}

func mustBeRefused(err error, code codes.Code) error {
	if status.Code(err) == code {
		return nil
	}
	if err == nil {
		return fmt.Errorf("it was not refused with %s", code)
	}
	return err
}

// apply has the operation's effect on the world.
func (r *run) apply(o model.Operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Apply(r.world)
}

func (r *run) id(what string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ids[what]
}

func (r *run) membersOf(group string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.members[group]
}

// volume gives a volume as it is, the machine that it is on, and its ID.
func (r *run) volume(name string) (model.Volume, *machine, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return *r.world.Volumes[name], r.site.nodes()[r.at[name]], r.ids[model.FactVolume+name]
}

func capability(kind model.Kind) *csi.VolumeCapability {
	if kind == model.Block {
		return harness.Block(harness.Writer)
	}
	return harness.Mount(string(kind), harness.Writer)
}

func (r *run) createRequest(o model.Operation) *csi.CreateVolumeRequest {
	q := &csi.CreateVolumeRequest{
		Name:               o.Volume,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: o.Size},
		VolumeCapabilities: []*csi.VolumeCapability{capability(o.Kind)},
		Parameters:         map[string]string{},
	}
	if o.Thick {
		q.Parameters["provisioning"] = "thick"
	}
	switch {
	case o.FromSnapshot != "":
		harness.FromSnapshot(r.id(model.FactSnapshot + o.FromSnapshot))(q)
	case o.FromVolume != "":
		harness.FromVolume(r.id(model.FactVolume + o.FromVolume))(q)
	}
	if o.Node != "" {
		only := []*csi.Topology{{Segments: map[string]string{request.TopologyKey: o.Node}}}
		q.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: only, Preferred: only}
	}
	return q
}

func (r *run) create(o model.Operation) error {
	q, asked := r.createRequest(o), r.asked(o)
	response, err := ask(r, o, "CreateVolume", func(ctx context.Context) (*csi.CreateVolumeResponse, error) {
		return r.site.client().CreateVolume(ctx, q)
	})
	if err != nil {
		return err
	}
	v := response.GetVolume()
	node, err := r.nodeOf(v)
	switch {
	case err != nil:
		return err
	case v.GetCapacityBytes() != o.Size:
		return fmt.Errorf("it has %d bytes", v.GetCapacityBytes())
	case v.GetContentSource().String() != q.GetVolumeContentSource().String():
		return fmt.Errorf("it is told to be of %s", v.GetContentSource())
	case o.Node != "" && r.site.nodes()[node].Node != o.Node:
		return fmt.Errorf("it is on %s", r.site.nodes()[node].Node)
	}
	if o.GiveUp {
		if err := r.deleteVolume(o, v.GetVolumeId()); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ids[model.FactVolume+o.Volume], r.at[o.Volume] = v.GetVolumeId(), node
	r.observe()
	o.Made(r.world, asked)
	return nil
}

// nodeOf finds the machine that a volume is told to be on.
func (r *run) nodeOf(v *csi.Volume) (int, error) {
	for i, m := range r.site.nodes() {
		for _, t := range v.GetAccessibleTopology() {
			if t.GetSegments()[request.TopologyKey] == m.Node {
				return i, nil
			}
		}
	}
	return 0, fmt.Errorf("it is on none of the nodes: %v", v.GetAccessibleTopology())
}

// asked is what the sources of a copy contain as it is asked for.
func (r *run) asked(o model.Operation) map[string]model.Content {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.observe()
	asked := map[string]model.Content{}
	for _, source := range o.Sources() {
		asked[source] = r.world.Volumes[source].Content.Seen()
	}
	return asked
}

// observe takes in how far all writers are.
func (r *run) observe() {
	for name, w := range r.live {
		safe := w.Safe.Load()
		r.world.Volumes[name].Content.Progress(safe, w.begun.Load())
	}
}

func (r *run) deleteVolume(o model.Operation, id string) error {
	_, err := ask(r, o, "DeleteVolume", func(ctx context.Context) (*csi.DeleteVolumeResponse, error) {
		return r.site.client().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	})
	return err
}

func (r *run) deleteSnapshot(o model.Operation, id string) error {
	_, err := ask(r, o, "DeleteSnapshot", func(ctx context.Context) (*csi.DeleteSnapshotResponse, error) {
		return r.site.client().DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	})
	return err
}

func (r *run) deleteGroup(o model.Operation, ids []string) error {
	q := &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: groupID(o.Group), SnapshotIds: ids}
	_, err := ask(r, o, "DeleteVolumeGroupSnapshot", func(ctx context.Context) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
		return r.site.client().DeleteVolumeGroupSnapshot(ctx, q)
	})
	return err
}

func groupID(name string) string { return pool.NewGroup(name, nil).ID }

func (r *run) snapshot(o model.Operation) error {
	v, _, id := r.volume(o.Volume)
	asked := r.asked(o)
	response, err := ask(r, o, "CreateSnapshot", func(ctx context.Context) (*csi.CreateSnapshotResponse, error) {
		return r.site.client().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: o.Snapshot, SourceVolumeId: id})
	})
	if err != nil {
		return err
	}
	s := response.GetSnapshot()
	if s.GetSizeBytes() != v.Size || s.GetSourceVolumeId() != id || !s.GetReadyToUse() {
		return fmt.Errorf("it is %v", s)
	}
	if o.GiveUp {
		if err := r.deleteSnapshot(o, s.GetSnapshotId()); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ids[model.FactSnapshot+o.Snapshot] = s.GetSnapshotId()
	r.observe()
	o.Made(r.world, asked)
	return nil
}

func (r *run) snapshotGroup(o model.Operation) error {
	q := &csi.CreateVolumeGroupSnapshotRequest{Name: o.Group}
	sizes := map[string]int64{}
	names := map[string]string{}
	for _, m := range o.Members {
		v, _, id := r.volume(m)
		q.SourceVolumeIds = append(q.SourceVolumeIds, id)
		sizes[id], names[id] = v.Size, m
	}
	// The kernel has no freeze for devices: without a pod that could be stopped,
	// nobody may write to them.
	defer r.pause(o.Raw)()
	asked := r.asked(o)
	response, err := ask(r, o, "CreateVolumeGroupSnapshot", func(ctx context.Context) (*csi.CreateVolumeGroupSnapshotResponse, error) {
		return r.site.client().CreateVolumeGroupSnapshot(ctx, q)
	})
	if err != nil {
		return err
	}
	g := response.GetGroupSnapshot()
	if g.GetGroupSnapshotId() != groupID(o.Group) || len(g.GetSnapshots()) != len(o.Members) || !g.GetReadyToUse() {
		return fmt.Errorf("it is %v", g)
	}
	var ids []string
	for _, s := range g.GetSnapshots() {
		if s.GetSizeBytes() != sizes[s.GetSourceVolumeId()] {
			return fmt.Errorf("it has %v", s)
		}
		ids = append(ids, s.GetSnapshotId())
	}
	if o.GiveUp {
		if err := r.deleteGroup(o, ids); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[o.Group] = ids
	for _, s := range g.GetSnapshots() {
		r.ids[model.FactSnapshot+o.Group+"/"+names[s.GetSourceVolumeId()]] = s.GetSnapshotId()
	}
	r.observe()
	o.Made(r.world, asked)
	return nil
}

// pause keeps the writers of these volumes off, until it is ended.
func (r *run) pause(volumes []string) (end func()) {
	var paused []*writer
	r.mu.Lock()
	for _, name := range volumes { // they are sorted: nobody waits for each other
		if w := r.live[name]; w != nil {
			paused = append(paused, w)
		}
	}
	r.mu.Unlock()
	r.steady.RLock()
	defer r.steady.RUnlock()
	for _, w := range paused {
		for !w.pause.TryLock() { // for long only if another group has it
			r.steady.RUnlock()
			time.Sleep(time.Millisecond)
			r.steady.RLock()
		}
		w.held.Store(true)
	}
	return func() {
		for _, w := range paused {
			w.held.Store(false)
			w.pause.Unlock()
		}
	}
}

func (r *run) grow(o model.Operation) error {
	v, _, id := r.volume(o.Volume)
	response, err := ask(r, o, "ControllerExpandVolume", func(ctx context.Context) (*csi.ControllerExpandVolumeResponse, error) {
		return r.site.client().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: o.Size}, VolumeCapability: capability(v.Kind),
		})
	})
	if err != nil {
		return err
	}
	if response.GetCapacityBytes() != o.Size {
		return fmt.Errorf("it has %d bytes", response.GetCapacityBytes())
	}
	r.apply(o)
	return nil
}

// mayGrowInUse tells whether the kernel lets an ext4 grow that is mounted.
func mayGrowInUse() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func (r *run) growDevice(o model.Operation) error {
	v, m, id := r.volume(o.Volume)
	at := m.staging(o.Volume)
	if v.Published != model.Nowhere {
		at = m.target(o.Volume)
	}
	var want []codes.Code
	if v.Kind == model.Ext4 && !mayGrowInUse() {
		want = append(want, codes.FailedPrecondition) // it grows when it is staged again
	}
	_, err := ask(r, o, "NodeExpandVolume", func(ctx context.Context) (*csi.NodeExpandVolumeResponse, error) {
		return m.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: id, VolumePath: at, StagingTargetPath: m.staging(o.Volume),
			CapacityRange: &csi.CapacityRange{RequiredBytes: v.Size}, VolumeCapability: capability(v.Kind),
		})
	}, want...)
	if err != nil && !slices.Contains(want, status.Code(err)) {
		return err
	}
	r.apply(o)
	if err == nil && v.Kind != model.Block {
		return spans(at, v.Size)
	}
	return nil
}

// spans is an error unless a filesystem is nearly as large as its volume. XFS does
// not count its log, of 64 MiB at most.
func spans(dir string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if got := int64(st.Blocks) * st.Frsize; got < size*85/100-64*mib {
		return fmt.Errorf("its filesystem has %d of %d bytes", got, size)
	}
	return nil
}

func (r *run) stage(o model.Operation) error {
	v, m, id := r.volume(o.Volume)
	staging := m.staging(o.Volume)
	if err := os.MkdirAll(staging, 0o750); err != nil {
		return err
	}
	_, err := ask(r, o, "NodeStageVolume", func(ctx context.Context) (*csi.NodeStageVolumeResponse, error) {
		return m.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: capability(v.Kind)})
	})
	if err != nil {
		return err
	}
	r.apply(o)
	if v.Kind != model.Block {
		return spans(staging, v.Size)
	}
	return nil
}

func (r *run) unstage(o model.Operation) error {
	_, m, id := r.volume(o.Volume)
	staging := m.staging(o.Volume)
	_, err := ask(r, o, "NodeUnstageVolume", func(ctx context.Context) (*csi.NodeUnstageVolumeResponse, error) {
		return m.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
	})
	if err != nil {
		return err
	}
	r.apply(o)
	return os.Remove(staging) // empty, as the orchestrator made it
}

// publish publishes a volume, looks at its data, and has it written to if it may
// be.
func (r *run) publish(o model.Operation) error {
	v, m, id := r.volume(o.Volume)
	target := m.target(o.Volume)
	_, err := ask(r, o, "NodePublishVolume", func(ctx context.Context) (*csi.NodePublishVolumeResponse, error) {
		return m.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: id, StagingTargetPath: m.staging(o.Volume), TargetPath: target,
			VolumeCapability: capability(v.Kind), Readonly: o.Access == model.ReadOnly,
		})
	})
	if err != nil {
		return err
	}
	if err := r.compare(v, target); err != nil {
		return err
	}
	if o.Access == model.ReadOnly {
		r.apply(o)
		return mustBeReadOnly(target, v.Kind)
	}
	log, err := openLog(target, v.Kind)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.numbers++
	w := write(log, v, r.numbers)
	r.world.Volumes[o.Volume].Content.Begin(w.number)
	r.live[o.Volume], r.writers[w.number] = w, w
	o.Apply(r.world)
	return nil
}

// compare looks at the data of a volume that nobody writes to.
func (r *run) compare(v model.Volume, target string) error {
	found, err := read(target, v.Kind, v.Content)
	if err != nil {
		return fmt.Errorf("its data: %w", err)
	}
	size, err := checkFills(target, v.Kind, v.Content)
	if err != nil {
		return fmt.Errorf("its data: %w", err)
	}
	r.figures.looks.Add(1)
	r.figures.looked.Add(size + min(found.last, slots)*recordSize)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := v.Content.Learn(found.last); err != nil {
		return fmt.Errorf("its data: %w", err)
	}
	r.seen[v.Content.Last] = found.begun
	return nil
}

func mustBeReadOnly(target string, kind model.Kind) error {
	f, err := os.OpenFile(logOf(target, kind), os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = f.WriteAt(make([]byte, recordSize), 0) // one that must not get there
		f.Close()
	}
	if !errors.Is(err, unix.EROFS) && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("it is not read-only: %w", err)
	}
	return nil
}

func (r *run) unpublish(o model.Operation) error {
	v, m, id := r.volume(o.Volume)
	if v.Published == model.Writable {
		if err := r.endWriter(o.Volume); err != nil {
			return fmt.Errorf("its writer: %w", err)
		}
	}
	target := m.target(o.Volume)
	_, err := ask(r, o, "NodeUnpublishVolume", func(ctx context.Context) (*csi.NodeUnpublishVolumeResponse, error) {
		return m.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
	})
	if err != nil {
		return err
	}
	if _, err := os.Lstat(target); err == nil {
		return errors.New("its target is still there")
	}
	r.apply(o)
	return nil
}

// endWriter ends the writer of a volume.
func (r *run) endWriter(volume string) error {
	r.steady.RLock()
	defer r.steady.RUnlock()
	r.mu.Lock()
	w := r.live[volume]
	r.mu.Unlock()
	if err := w.End(); err != nil {
		return err
	}
	r.figures.records.Add(w.Safe.Load() - w.first + 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, volume)
	r.world.Volumes[volume].Content.End(w.Safe.Load())
	return nil
}

// write writes bytes that stay as they are.
func (r *run) write(o model.Operation) error {
	v, m, _ := r.volume(o.Volume)
	if err := putFill(m.target(o.Volume), v.Kind, len(v.Content.Fills), model.Fill{Seed: o.Seed, Size: o.Size}); err != nil {
		return err
	}
	r.apply(o)
	return nil
}

// list compares what is listed, in pages, with what there was before and is still.
func (r *run) list(o model.Operation) error {
	before := r.born()
	_, err := ask(r, o, "ListVolumes and ListSnapshots", func(ctx context.Context) (struct{}, error) {
		volumes, snapshots, err := listed(ctx, r.site.client(), o.Page)
		if err != nil {
			return struct{}{}, err
		}
		ids := map[string]bool{}
		for _, v := range volumes {
			ids[v.GetVolumeId()] = true
		}
		for _, s := range snapshots {
			ids[s.GetSnapshotId()] = true
		}
		for what, born := range r.born() {
			if before[what] == born && !ids[r.id(what)] {
				return struct{}{}, fmt.Errorf("%s is not listed", what)
			}
		}
		return struct{}{}, nil
	})
	return err
}

// born tells which operation has made each volume and snapshot that nobody is
// about to remove.
func (r *run) born() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	born := map[string]int{}
	allowed := r.world.Allowed(r.openOperations())
	for name, v := range r.world.Volumes {
		if what := model.FactVolume + name; !allowed[what][""] {
			born[what] = v.Born
		}
	}
	for name, s := range r.world.Snapshots {
		if what := model.FactSnapshot + name; !allowed[what][""] {
			born[what] = s.Born
		}
	}
	return born
}

func (r *run) openOperations() []model.Operation {
	var open []model.Operation
	for _, o := range r.open {
		open = append(open, o)
	}
	slices.SortFunc(open, func(a, b model.Operation) int { return a.Number - b.Number })
	return open
}

// listed gives all volumes and snapshots, so many at a time; 0 is all at once.
func listed(ctx context.Context, c clients, page int32) (volumes []*csi.Volume, snapshots []*csi.Snapshot, err error) {
	for token := ""; ; {
		response, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: page, StartingToken: token})
		if err != nil {
			return nil, nil, err
		}
		for _, e := range response.GetEntries() {
			volumes = append(volumes, e.GetVolume())
		}
		if token = response.GetNextToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		response, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: page, StartingToken: token})
		if err != nil {
			return nil, nil, err
		}
		for _, e := range response.GetEntries() {
			snapshots = append(snapshots, e.GetSnapshot())
		}
		if token = response.GetNextToken(); token == "" {
			break
		}
	}
	return volumes, snapshots, nil
}

// consistent is an error if what is known of a group's snapshots cannot have been
// at one instant: if one has a record that was begun when another's was on stable
// storage already, the other must have that.
func (r *run) consistent(group string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var begun int64
	var latest string
	written := 0
	members := r.world.Members(group)
	for name, s := range members {
		if at := r.seen[s.Content.Last]; at > begun {
			begun, latest = at, name
		}
	}
	for name, s := range members {
		if _, known := r.seen[s.Content.Last]; !known || len(s.Content.Parts) == 0 {
			continue
		}
		w := r.writers[s.Content.Parts[len(s.Content.Parts)-1].Writer]
		if w.volume != s.Of {
			continue // it was a copy, in which nobody had written yet
		}
		written++
		if due := w.endedBefore(begun); s.Content.Last.Least < due {
			return fmt.Errorf("group %s: the snapshot of %s ends with record %d, and that of %s has one that was begun when record %d was on stable storage", group, name, s.Content.Last.Least, latest, due)
		}
	}
	if written > 1 {
		r.figures.groups.Add(1)
	}
	return nil
}

// clients are those of a controller.
type clients struct {
	csi.ControllerClient
	csi.GroupControllerClient
}
