package controller

import (
	"context"
	"errors"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// groupCapabilities is what the GroupController service can do (CSI spec
// v1.13.0, GroupControllerServiceCapability).
var groupCapabilities = []csi.GroupControllerServiceCapability_RPC_Type{
	csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT,
}

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (s *Server) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return GroupCapabilities(), nil
}

// GroupCapabilities is what the GroupController service can do.
func GroupCapabilities() *csi.GroupControllerGetCapabilitiesResponse {
	response := &csi.GroupControllerGetCapabilitiesResponse{}
	for _, c := range groupCapabilities {
		response.Capabilities = append(response.Capabilities, &csi.GroupControllerServiceCapability{
			Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{Type: c}},
		})
	}
	return response
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s *Server) CreateVolumeGroupSnapshot(ctx context.Context, r *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	group, err := request.Group(r)
	if err != nil {
		return nil, err
	}
	end, err := s.pools.BeginGroup(group.ID, pool.Create)
	if err != nil {
		return nil, err
	}
	members, err := finish(ctx, s, func(ctx context.Context) ([]pool.Snapshot, error) {
		defer end()
		return s.cutGroup(ctx, group)
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: GroupSnapshot(group.ID, s.snapshots(members))}, nil
}

// cutGroup finds the group, or makes it.
func (s *Server) cutGroup(ctx context.Context, group pool.Group) ([]pool.Snapshot, error) {
	existing, members, err := s.pools.Group(group.ID)
	switch {
	case err == nil && !existing.Same(group):
		return nil, pool.Errorf(pool.ErrExists, "group snapshot %s exists, of other volumes", existing.ID)
	case err == nil && len(group.Missing(members)) == 0:
		return members, nil
	case err != nil && !errors.Is(err, pool.ErrNotFound):
		return nil, err
	}
	for _, id := range group.Volumes {
		if _, _, err := s.pools.Volume(id); err != nil {
			return nil, err // before anything is removed for it
		}
	}
	if err := s.pools.ClearGroup(ctx, group.ID); err != nil {
		return nil, err
	}
	c, err := s.pools.PrepareGroup(ctx, group, group.Volumes)
	if err != nil {
		return nil, err
	}
	return pool.CutTogether(ctx, c)
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s *Server) DeleteVolumeGroupSnapshot(ctx context.Context, r *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	if err := request.Required("group_snapshot_id", r.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	if err := s.pools.DeleteGroup(ctx, r.GetGroupSnapshotId(), r.GetSnapshotIds()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s *Server) GetVolumeGroupSnapshot(_ context.Context, r *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if err := request.Required("group_snapshot_id", r.GetGroupSnapshotId()); err != nil {
		return nil, err
	}
	group, members, err := s.pools.GroupWith(r.GetGroupSnapshotId(), r.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	if err := group.MustBeWhole(members); err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: GroupSnapshot(group.ID, s.snapshots(members))}, nil
}

func (s *Server) snapshots(members []pool.Snapshot) []*csi.Snapshot {
	list := make([]*csi.Snapshot, len(members))
	for i, m := range members {
		list[i] = s.snapshot(m)
	}
	return list
}

// GroupSnapshot is the CSI form of a group. It was taken when the last of its
// snapshots was cut: until then nothing was written to the volumes of the others.
func GroupSnapshot(id string, members []*csi.Snapshot) *csi.VolumeGroupSnapshot {
	last := slices.MaxFunc(members, func(a, b *csi.Snapshot) int {
		return a.GetCreationTime().AsTime().Compare(b.GetCreationTime().AsTime())
	})
	return &csi.VolumeGroupSnapshot{
		GroupSnapshotId: id,
		Snapshots:       members,
		CreationTime:    timestamppb.New(last.GetCreationTime().AsTime()),
		ReadyToUse:      true,
	}
}
