package peerapi

import (
	"time"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// FromGroup is the message of a group.
func FromGroup(g pool.Group) *Group { return &Group{Name: g.Name, VolumeIds: g.Volumes} }

// ToGroup is the group of a message.
func ToGroup(m *Group) pool.Group { return pool.NewGroup(m.GetName(), m.GetVolumeIds()) }

// FromSnapshots is the messages of snapshots.
func FromSnapshots(snapshots []pool.Snapshot) []*Snapshot {
	messages := make([]*Snapshot, len(snapshots))
	for i, s := range snapshots {
		messages[i] = &Snapshot{SnapshotId: s.ID, SourceVolumeId: s.SourceID, SizeBytes: s.Size, Created: s.Created.UnixNano()}
	}
	return messages
}

// ToSnapshots is the snapshots of messages, as far as those tell.
func ToSnapshots(messages []*Snapshot) []pool.Snapshot {
	snapshots := make([]pool.Snapshot, len(messages))
	for i, m := range messages {
		snapshots[i] = pool.Snapshot{ID: m.GetSnapshotId(), SourceID: m.GetSourceVolumeId(), Size: m.GetSizeBytes(), Created: time.Unix(0, m.GetCreated()).UTC()}
	}
	return snapshots
}
