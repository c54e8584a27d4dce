package controller

import (
	"context"
	"errors"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// CreateSnapshot implements csi.ControllerServer.
func (s *Server) CreateSnapshot(ctx context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := request.Required("name", r.GetName()); err != nil {
		return nil, err
	}
	if err := request.Required("source_volume_id", r.GetSourceVolumeId()); err != nil {
		return nil, err
	}
	if err := request.ParseSnapshotParameters(r.GetParameters()); err != nil {
		return nil, err
	}
	if !request.Reachable(r.GetAccessibilityRequirements(), s.segment) {
		return nil, pool.Errorf(pool.ErrNoSpace, "accessibility_requirements do not allow node %s, where the volume is", s.segment)
	}
	existingOnly := request.ExistingOnly(ctx)
	wanted := pool.SnapshotSpec{RequestName: r.GetName(), ForCopy: request.ForCopy(ctx)}
	name := pool.NameFor(r.GetName())
	if wanted.ForCopy {
		s.copies.Use(name)
	}
	end, err := s.pools.BeginSnapshot(name, pool.Create)
	if err != nil {
		return nil, err
	}
	snapshot, err := finish(ctx, s, func(ctx context.Context) (pool.Snapshot, error) {
		defer end()
		return s.snap(ctx, r.GetSourceVolumeId(), existingOnly, wanted)
	})
	if err != nil {
		return nil, err
	}
	response := &csi.CreateSnapshotResponse{Snapshot: s.snapshot(snapshot)}
	if s.alreadyKnown(r.GetAccessibilityRequirements()) {
		response.Snapshot.AccessibleTopology = nil
	}
	return response, nil
}

// alreadyKnown reports whether a request demands just the topology that the
// answer would tell. The field is optional, and csi-sanity v5.6.0 cannot
// compare what it sent with what it gets back: it compares the Go structs,
// with protobuf's bookkeeping in them.
func (s *Server) alreadyKnown(t *csi.TopologyRequirement) bool {
	for _, topology := range t.GetRequisite() {
		if topology.GetSegments()[request.TopologyKey] != s.segment {
			return false
		}
	}
	return len(t.GetRequisite()) > 0
}

// snap finds the snapshot that is wanted of a volume, or makes it unless
// existingOnly.
func (s *Server) snap(ctx context.Context, volumeID string, existingOnly bool, wanted pool.SnapshotSpec) (pool.Snapshot, error) {
	_, existing, err := s.pools.SnapshotNamed(wanted.RequestName)
	switch {
	case err == nil && (existing.SourceID != volumeID || existing.RequestName != wanted.RequestName || existing.Group != nil || existing.ForCopy != wanted.ForCopy):
		return pool.Snapshot{}, pool.Errorf(pool.ErrExists, "snapshot %s exists, of volume %s", existing.ID, existing.SourceID)
	case err == nil || existingOnly || !errors.Is(err, pool.ErrNotFound):
		return existing, err
	}
	engine, v, release, err := s.holdSource(volumeID)
	if err != nil {
		return pool.Snapshot{}, err
	}
	defer release()
	wanted.Volume = v.Name
	return engine.CreateSnapshot(ctx, wanted)
}

// DeleteSnapshot implements csi.ControllerServer.
func (s *Server) DeleteSnapshot(ctx context.Context, r *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if err := request.Required("snapshot_id", r.GetSnapshotId()); err != nil {
		return nil, err
	}
	if err := s.deleteSnapshot(ctx, r.GetSnapshotId()); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// deleteSnapshot removes the snapshot with that ID, if it is there.
func (s *Server) deleteSnapshot(ctx context.Context, id string) error {
	end, err := s.holdSnapshot(id, pool.Delete)
	if errors.Is(err, pool.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer end()
	engine, snapshot, err := s.pools.Snapshot(id)
	if errors.Is(err, pool.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if snapshot.Group != nil {
		return pool.Errorf(pool.ErrInvalid, "snapshot %s is part of group snapshot %s, with which alone it can be deleted", snapshot.ID, snapshot.Group.ID)
	}
	if err := engine.DeleteSnapshot(ctx, snapshot.Name); err != nil {
		return err
	}
	return nil
}

// holdSnapshot enters an operation on the snapshot with that ID.
func (s *Server) holdSnapshot(id string, op pool.Operation) (end func(), err error) {
	parsed, err := pool.ParseID(id)
	if err != nil {
		return nil, err
	}
	return s.pools.BeginSnapshot(parsed.Name, op)
}

// GetSnapshot implements csi.ControllerServer.
func (s *Server) GetSnapshot(_ context.Context, r *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if err := request.Required("snapshot_id", r.GetSnapshotId()); err != nil {
		return nil, err
	}
	_, snapshot, err := s.pools.Snapshot(r.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: s.snapshot(snapshot)}, nil
}

// ListSnapshots implements csi.ControllerServer.
func (s *Server) ListSnapshots(_ context.Context, r *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	most, err := pageSize(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	if id := r.GetSnapshotId(); id != "" {
		_, snapshot, err := s.pools.Snapshot(id)
		if errors.Is(err, pool.ErrNotFound) || err == nil && !ofVolume(snapshot, r.GetSourceVolumeId()) {
			return &csi.ListSnapshotsResponse{}, nil
		}
		if err != nil {
			return nil, err
		}
		return &csi.ListSnapshotsResponse{Entries: []*csi.ListSnapshotsResponse_Entry{{Snapshot: s.snapshot(snapshot)}}}, nil
	}
	page, next, err := s.pools.Snapshots(r.GetStartingToken(), most, func(snapshot pool.Snapshot) bool {
		return ofVolume(snapshot, r.GetSourceVolumeId()) && !snapshot.ForCopy
	})
	if err != nil {
		return nil, err
	}
	response := &csi.ListSnapshotsResponse{NextToken: next}
	for _, snapshot := range page {
		response.Entries = append(response.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s.snapshot(snapshot)})
	}
	return response, nil
}

func ofVolume(s pool.Snapshot, volumeID string) bool {
	return volumeID == "" || s.SourceID == volumeID
}

// snapshot is the CSI form of a snapshot.
func (s *Server) snapshot(snapshot pool.Snapshot) *csi.Snapshot {
	converted := &csi.Snapshot{
		SnapshotId:         snapshot.ID,
		SourceVolumeId:     snapshot.SourceID,
		SizeBytes:          snapshot.Size,
		CreationTime:       timestamppb.New(snapshot.Created),
		ReadyToUse:         true,
		AccessibleTopology: s.topology(),
	}
	if snapshot.Group != nil {
		converted.GroupSnapshotId = snapshot.Group.ID
	}
	return converted
}
