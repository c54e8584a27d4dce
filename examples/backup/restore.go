package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// restore makes a volume that is equal to a file, and gives its ID.
func restore(ctx context.Context, d *driver, file, name, filesystem string) (string, error) {
	s, err := readState(file)
	if err != nil {
		return "", err
	}
	if s.Snapshot == "" || !s.Begun.IsZero() {
		return "", fmt.Errorf("%s is not whole: the last save was interrupted; run it again", file)
	}
	if filesystem == "" {
		return d.restoreBlock(ctx, file, name, s.Capacity)
	}
	// A volume is handed out as a device or as a filesystem, never as both:
	// the bytes are written to one of the first kind, and go to one of the
	// second by a snapshot, which shares its blocks.
	written, err := d.restoreBlock(ctx, file, name+"-written", s.Capacity)
	if err != nil {
		return "", err
	}
	snapshot, err := d.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name + "-written", SourceVolumeId: written})
	if err != nil {
		return "", err
	}
	id := snapshot.GetSnapshot().GetSnapshotId()
	created, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name,
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: filesystem}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}},
		VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
		}},
	})
	if err != nil {
		return "", err
	}
	return created.GetVolume().GetVolumeId(), errors.Join(d.deleteSnapshot(ctx, id), d.deleteVolume(ctx, written))
}

// restoreBlock makes a block volume, writes the file's data to it, and compares
// the two. A new volume reads as zeros, so that the file's holes need not be
// written; one of that name that is there already must be of the same size.
func (d *driver) restoreBlock(ctx context.Context, file, name string, capacity int64) (string, error) {
	created, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, VolumeCapabilities: []*csi.VolumeCapability{capability()},
		CapacityRange: &csi.CapacityRange{RequiredBytes: capacity, LimitBytes: capacity},
	})
	if err != nil {
		return "", fmt.Errorf("making volume %s: %w", name, err)
	}
	id := created.GetVolume().GetVolumeId()
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return id, d.use(ctx, id, file+".volume", func(path string) error {
		device, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer device.Close()
		if err := copyData(ctx, device, f); err != nil {
			return err
		}
		if err := device.Sync(); err != nil {
			return err
		}
		return equal(ctx, f, device, capacity)
	})
}

// copyData copies a file without its holes.
func copyData(ctx context.Context, device, f *os.File) error {
	buffer := make([]byte, piece)
	for end := int64(0); ; {
		begin, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // none left
		}
		if err != nil {
			return err
		}
		if end, err = f.Seek(begin, unix.SEEK_HOLE); err != nil {
			return err
		}
		for off := begin; off < end; off += piece {
			if err := ctx.Err(); err != nil {
				return err
			}
			data := buffer[:min(piece, end-off)]
			if _, err := f.ReadAt(data, off); err != nil {
				return err
			}
			if _, err := device.WriteAt(data, off); err != nil {
				return err
			}
		}
	}
}
