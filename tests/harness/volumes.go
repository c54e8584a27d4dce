package harness

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Mode is short for the access modes.
type Mode = csi.VolumeCapability_AccessMode_Mode

// Writer is the access mode of ReadWriteOnce.
const Writer = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER

// Mount is the capability of a filesystem volume.
func Mount(fsType string, mode Mode, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

// Block is the capability of a block volume.
func Block(mode Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

// Context is the context of a test's calls.
func (d *Driver) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	d.t.Cleanup(cancel)
	return ctx
}

// Create creates a volume; more changes the request before it is sent.
func (d *Driver) Create(name string, size int64, c *csi.VolumeCapability, more ...func(*csi.CreateVolumeRequest)) *csi.Volume {
	d.t.Helper()
	r := &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{c}}
	if size > 0 {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: size}
	}
	for _, change := range more {
		change(r)
	}
	response, err := d.CreateVolume(d.Context(), r)
	if err != nil {
		d.t.Fatalf("CreateVolume %s: %v", name, err)
	}
	return response.GetVolume()
}

// FromSnapshot makes CreateVolume restore a snapshot.
func FromSnapshot(id string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
		}}
	}
}

// FromVolume makes CreateVolume clone a volume.
func FromVolume(id string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id},
		}}
	}
}

// Parameters sets the StorageClass parameters of CreateVolume, as key, value,
// key, value.
func Parameters(pairs ...string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		r.Parameters = map[string]string{}
		for i := 0; i+1 < len(pairs); i += 2 {
			r.Parameters[pairs[i]] = pairs[i+1]
		}
	}
}

// Snapshot cuts a snapshot.
func (d *Driver) Snapshot(name, volumeID string) *csi.Snapshot {
	d.t.Helper()
	response, err := d.CreateSnapshot(d.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volumeID})
	if err != nil {
		d.t.Fatalf("CreateSnapshot %s: %v", name, err)
	}
	return response.GetSnapshot()
}

// Use stages a volume and publishes it, and gives the target path.
func (d *Driver) Use(name, volumeID string, c *csi.VolumeCapability) string {
	d.t.Helper()
	staging, target := d.Staging(name), d.Target(name)
	if _, err := d.NodeStageVolume(d.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: volumeID, StagingTargetPath: staging, VolumeCapability: c,
	}); err != nil {
		d.t.Fatalf("NodeStageVolume %s: %v", name, err)
	}
	if _, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: volumeID, StagingTargetPath: staging, TargetPath: target, VolumeCapability: c,
	}); err != nil {
		d.t.Fatalf("NodePublishVolume %s: %v", name, err)
	}
	return target
}

// Release undoes Use.
func (d *Driver) Release(name, volumeID string) {
	d.t.Helper()
	if _, err := d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{
		VolumeId: volumeID, TargetPath: d.Target(name),
	}); err != nil {
		d.t.Fatalf("NodeUnpublishVolume %s: %v", name, err)
	}
	if _, err := d.NodeUnstageVolume(d.Context(), &csi.NodeUnstageVolumeRequest{
		VolumeId: volumeID, StagingTargetPath: filepath.Join(d.Dir, "staging", name),
	}); err != nil {
		d.t.Fatalf("NodeUnstageVolume %s: %v", name, err)
	}
	if _, err := os.Lstat(d.Target(name)); err == nil {
		d.t.Fatalf("NodeUnpublishVolume %s: the target path is still there", name)
	}
}

// Delete deletes a volume.
func (d *Driver) Delete(volumeID string) {
	d.t.Helper()
	if _, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: volumeID}); err != nil {
		d.t.Fatalf("DeleteVolume %s: %v", volumeID, err)
	}
}
