package request

import (
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Group checks a request for a group snapshot, and describes the group.
func Group(r *csi.CreateVolumeGroupSnapshotRequest) (pool.Group, error) {
	if err := Required("name", r.GetName()); err != nil {
		return pool.Group{}, err
	}
	if len(r.GetSourceVolumeIds()) == 0 {
		return pool.Group{}, pool.Errorf(pool.ErrInvalid, "source_volume_ids is missing")
	}
	group := pool.NewGroup(r.GetName(), r.GetSourceVolumeIds())
	for i, id := range group.Volumes {
		if id == "" {
			return pool.Group{}, pool.Errorf(pool.ErrInvalid, "source_volume_ids has one that is empty")
		}
		if i > 0 && slices.Contains(group.Volumes[:i], id) {
			return pool.Group{}, pool.Errorf(pool.ErrInvalid, "source_volume_ids has %.130q twice", id)
		}
	}
	return group, ParseSnapshotParameters(r.GetParameters())
}
