package controller

import (
	"iter"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// metadataBatch is the most ranges in one message, some 80 KiB; gRPC takes 4 MiB
// by default.
const metadataBatch = 4096

// metadataType tells that ranges have any length: they are runs of blocks that
// were written, put together where they touch. Blocks of one fixed size would
// need 262,144 entries to tell that 1 GiB was.
const metadataType = csi.BlockMetadataType_VARIABLE_LENGTH

// GetMetadataAllocated implements csi.SnapshotMetadataServer. The snapshot
// cannot be deleted until the stream ends.
func (s *Server) GetMetadataAllocated(r *csi.GetMetadataAllocatedRequest, out csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	if err := request.Required("snapshot_id", r.GetSnapshotId()); err != nil {
		return err
	}
	if err := maxResults(r.GetMaxResults()); err != nil {
		return err
	}
	engine, snapshot, release, err := s.readSnapshot(r.GetSnapshotId())
	if err != nil {
		return err
	}
	defer release()
	if err := within(r.GetStartingOffset(), snapshot); err != nil {
		return err
	}
	ranges := engine.Allocated(out.Context(), snapshot.Name, r.GetStartingOffset())
	return inBatches(ranges, r.GetMaxResults(), func(batch []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataAllocatedResponse{
			BlockMetadataType: metadataType, VolumeCapacityBytes: snapshot.Size, BlockMetadata: batch,
		})
	})
}

// GetMetadataDelta implements csi.SnapshotMetadataServer. Neither snapshot can
// be deleted until the stream ends. That the target is the later one is not
// looked at: what differs is the same either way, and clocks can go wrong.
func (s *Server) GetMetadataDelta(r *csi.GetMetadataDeltaRequest, out csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	if err := request.Required("base_snapshot_id", r.GetBaseSnapshotId()); err != nil {
		return err
	}
	if err := request.Required("target_snapshot_id", r.GetTargetSnapshotId()); err != nil {
		return err
	}
	if err := maxResults(r.GetMaxResults()); err != nil {
		return err
	}
	baseEngine, base, releaseBase, err := s.readSnapshot(r.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	defer releaseBase()
	engine, target, releaseTarget, err := s.readSnapshot(r.GetTargetSnapshotId())
	if err != nil {
		return err
	}
	defer releaseTarget()
	if err := within(r.GetStartingOffset(), target); err != nil {
		return err
	}
	if baseEngine != engine {
		return pool.Errorf(pool.ErrPrecondition, "snapshots %s and %s are in two pools: only of one volume can be told what changed", base.ID, target.ID)
	}
	ranges := engine.Changed(out.Context(), base.Name, target.Name, r.GetStartingOffset())
	return inBatches(ranges, r.GetMaxResults(), func(batch []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataDeltaResponse{
			BlockMetadataType: metadataType, VolumeCapacityBytes: target.Size, BlockMetadata: batch,
		})
	})
}

// readSnapshot finds a snapshot and holds it against deletion until release.
func (s *Server) readSnapshot(id string) (engine pool.Engine, snapshot pool.Snapshot, release func(), err error) {
	if release, err = s.holdSnapshot(id, pool.Inspect); err != nil {
		return nil, pool.Snapshot{}, nil, err
	}
	if engine, snapshot, err = s.pools.Snapshot(id); err != nil {
		release()
		return nil, pool.Snapshot{}, nil, err
	}
	return engine, snapshot, release, nil
}

func maxResults(n int32) error {
	if n < 0 {
		return pool.Errorf(pool.ErrInvalid, "max_results %d is negative", n)
	}
	return nil
}

func within(offset int64, s pool.Snapshot) error {
	if offset < 0 || offset > s.Size {
		return pool.Errorf(pool.ErrOutOfRange, "starting_offset %d is not within the %d bytes of snapshot %s", offset, s.Size, s.ID)
	}
	return nil
}

// inBatches sends ranges, at most that many at a time; 0 is as many as suit. The
// caller is told the capacity in any case, if only by an empty batch.
func inBatches(ranges iter.Seq2[pool.Range, error], most int32, send func([]*csi.BlockMetadata) error) error {
	size := metadataBatch
	if most > 0 {
		size = min(size, int(most))
	}
	var batch []*csi.BlockMetadata
	sent := false
	flush := func() error {
		err := send(batch)
		batch, sent = nil, true
		return err
	}
	for r, err := range ranges {
		if err != nil {
			return err
		}
		batch = append(batch, &csi.BlockMetadata{ByteOffset: r.Offset, SizeBytes: r.Length})
		if len(batch) == size {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if len(batch) > 0 || !sent {
		return flush()
	}
	return nil
}
