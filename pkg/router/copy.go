package router

import (
	"context"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

const (
	// ticketLife is how long a node may begin to read what it is to copy. A
	// retry brings a new ticket; what has begun is not cut off.
	ticketLife = 10 * time.Minute
	// tidyTime is how long the snapshot that a clone was copied from may take
	// to go. One that stays goes by itself when nobody reads it any more.
	tidyTime = 10 * time.Second
)

// copyTo makes a volume on a node that does not have its source. The node gets a
// ticket, reads the source's snapshot from its owner, and goes on with that when
// this call has ended; a retry brings it a new ticket and finds the result.
//
// Of a source that is a volume, a snapshot is cut for the copy, and removed when
// the copy has ended.
func (s *Server) copyTo(ctx context.Context, target, owner member, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	source := r.GetVolumeContentSource()
	existing, err := target.CreateVolume(request.WithExistingOnly(ctx), r)
	switch {
	case err == nil:
		if id, ok := copyID(source.GetVolume().GetVolumeId(), r.GetName()); ok {
			s.tidy(ctx, owner, id) // if the call that made the volume had ended before
		}
		return existing, nil
	case !is(err, codes.NotFound) && !is(err, codes.Aborted):
		return nil, at(ctx, target, err)
	}
	if id := source.GetSnapshot().GetSnapshotId(); id != "" {
		response, err := s.orderCopy(ctx, target, owner, id, r)
		return response, at(ctx, target, err)
	}
	cut, err := owner.CreateSnapshot(request.WithForCopy(ctx), &csi.CreateSnapshotRequest{
		Name:           request.CopyName(r.GetName()),
		SourceVolumeId: source.GetVolume().GetVolumeId(),
	})
	if err != nil {
		return nil, at(ctx, owner, err)
	}
	id := cut.GetSnapshot().GetSnapshotId()
	response, err := s.orderCopy(ctx, target, owner, id, r)
	if is(err, codes.ResourceExhausted) || tells(err) && !is(err, codes.Aborted) {
		s.tidy(ctx, owner, id)
	}
	return response, at(ctx, target, err)
}

// copyID is the ID of the snapshot that a clone of a volume is copied from.
func copyID(volumeID, requestName string) (string, bool) {
	id, err := pool.ParseID(volumeID)
	id.Name = pool.NameFor(request.CopyName(requestName))
	return id.String(), err == nil
}

// orderCopy lets a node make a volume of a snapshot of another.
func (s *Server) orderCopy(ctx context.Context, target, owner member, snapshotID string, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	ticket, err := s.sign(peer.Ticket{Snapshot: snapshotID, Reader: target.Segment, Expires: time.Now().Add(ticketLife)})
	if err != nil {
		return nil, err
	}
	ordered, err := request.WithCopyOrder(ctx, &peerapi.CopyOrder{
		Node: owner.Segment, Address: owner.Address, SnapshotId: snapshotID, Ticket: ticket,
	})
	if err != nil {
		return nil, err
	}
	return target.CreateVolume(ordered, r)
}

// tidy removes a snapshot that was cut to be copied.
func (s *Server) tidy(ctx context.Context, owner member, snapshotID string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTime)
	defer cancel()
	// That it fails is no matter of the caller's, who has a volume.
	_, _ = owner.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshotID})
}
