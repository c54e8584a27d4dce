package harness

import (
	"errors"
	"fmt"
	"io"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Metadata is what a stream of the SnapshotMetadata service told.
type Metadata struct {
	Capacity int64 // of the volume, bytes
	Ranges   []*csi.BlockMetadata
	Messages int
}

// metadata is a message of either stream.
type metadata interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// ReadMetadata reads a stream to its end and holds it to the rules of the
// specification. most is the request's max_results.
func ReadMetadata[Message metadata](stream interface{ Recv() (Message, error) }, startErr error, from int64, most int32) (m Metadata, err error) {
	if startErr != nil {
		return m, startErr
	}
	end := from
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if m.Messages == 0 {
				return m, errors.New("an empty stream tells no capacity")
			}
			return m, nil
		}
		if err != nil {
			return m, err
		}
		if m.Messages++; m.Messages == 1 {
			m.Capacity = message.GetVolumeCapacityBytes()
		}
		if message.GetBlockMetadataType() != csi.BlockMetadataType_VARIABLE_LENGTH || message.GetVolumeCapacityBytes() != m.Capacity {
			return m, fmt.Errorf("message %d has type %s and capacity %d", m.Messages, message.GetBlockMetadataType(), message.GetVolumeCapacityBytes())
		}
		if n := len(message.GetBlockMetadata()); most > 0 && n > int(most) {
			return m, fmt.Errorf("message %d has %d ranges, more than %d", m.Messages, n, most)
		}
		for _, r := range message.GetBlockMetadata() {
			if r.GetByteOffset() < end || r.GetSizeBytes() <= 0 || r.GetSizeBytes() > m.Capacity-r.GetByteOffset() {
				return m, fmt.Errorf("a range of %d bytes at %d follows %d in a volume of %d", r.GetSizeBytes(), r.GetByteOffset(), end, m.Capacity)
			}
			if len(m.Ranges) > 0 && r.GetByteOffset() == end {
				return m, fmt.Errorf("two ranges meet at %d", end)
			}
			end = r.GetByteOffset() + r.GetSizeBytes()
			m.Ranges = append(m.Ranges, r)
		}
	}
}

// Allocated asks what is allocated in a snapshot.
func (d *Driver) Allocated(r *csi.GetMetadataAllocatedRequest) (Metadata, error) {
	stream, err := d.GetMetadataAllocated(d.Context(), r)
	return ReadMetadata(stream, err, r.GetStartingOffset(), r.GetMaxResults())
}

// Delta asks what changed between two snapshots.
func (d *Driver) Delta(r *csi.GetMetadataDeltaRequest) (Metadata, error) {
	stream, err := d.GetMetadataDelta(d.Context(), r)
	return ReadMetadata(stream, err, r.GetStartingOffset(), r.GetMaxResults())
}
