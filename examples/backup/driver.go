package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// driver is a CSI driver, as its clients see it.
type driver struct {
	csi.ControllerClient
	csi.SnapshotMetadataClient
	csi.NodeClient

	connections []*grpc.ClientConn
}

func connect(controller, node string) (*driver, error) {
	d := &driver{}
	open := func(endpoint string) (*grpc.ClientConn, error) {
		c, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(patiently))
		if err == nil {
			d.connections = append(d.connections, c)
		}
		return c, err
	}
	c, err := open(controller)
	if err != nil {
		return nil, fmt.Errorf("--endpoint: %w", err)
	}
	d.ControllerClient, d.SnapshotMetadataClient, d.NodeClient = csi.NewControllerClient(c), csi.NewSnapshotMetadataClient(c), csi.NewNodeClient(c)
	if node != "" {
		if c, err = open(node); err != nil {
			d.close()
			return nil, fmt.Errorf("--node-endpoint: %w", err)
		}
		d.NodeClient = csi.NewNodeClient(c)
	}
	return d, nil
}

// patience is how long a call is repeated.
const patience = 2 * time.Minute

// patiently repeats a call that another call for the same volume or snapshot is
// in the way of, which may be one that this client has given up, and one that
// did not reach the driver. Every call of CSI can be repeated.
func patiently(ctx context.Context, method string, request, response any, c *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption) error {
	deadline := time.Now().Add(patience)
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := call(ctx, method, request, response, c, options...)
		code := status.Code(err)
		if code != codes.Aborted && code != codes.Unavailable || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

func (d *driver) close() {
	for _, c := range d.connections {
		_ = c.Close()
	}
}

// changes tells, range by range, what is allocated in the target or, if there is
// a base, what changed since. handle is called for each range, in order. A
// stream that breaks off is taken up behind the last range that came.
func (d *driver) changes(ctx context.Context, base, target string, handle func(off, n int64) error) (capacity int64, err error) {
	from := int64(0)
	for try := 0; ; try++ {
		recv, err := d.stream(ctx, base, target, from)
		for err == nil {
			var m message
			if m, err = recv(); err != nil {
				break
			}
			capacity = m.GetVolumeCapacityBytes()
			for _, r := range m.GetBlockMetadata() {
				if err := handle(r.GetByteOffset(), r.GetSizeBytes()); err != nil {
					return capacity, err
				}
				from, try = r.GetByteOffset()+r.GetSizeBytes(), 0
			}
		}
		switch {
		case errors.Is(err, io.EOF): // and nothing else says that it was all
			return capacity, nil
		case status.Code(err) != codes.Unavailable || try >= 5:
			return capacity, err
		}
		select {
		case <-time.After(time.Second << try):
		case <-ctx.Done():
			return capacity, ctx.Err()
		}
	}
}

// message is one of either kind of stream.
type message interface {
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

func (d *driver) stream(ctx context.Context, base, target string, from int64) (recv func() (message, error), err error) {
	if base == "" {
		s, err := d.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: target, StartingOffset: from})
		return func() (message, error) { return s.Recv() }, err
	}
	s, err := d.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: from})
	return func() (message, error) { return s.Recv() }, err
}

// capability is that of a block volume.
func capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// use publishes a block volume in a directory of its own, for as long as with
// lasts. What an earlier process left there is found again.
func (d *driver) use(ctx context.Context, volume, dir string, with func(device string) error) (err error) {
	staging, device := filepath.Join(dir, "staging"), filepath.Join(dir, "device")
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return err
	}
	if _, err := d.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: volume, StagingTargetPath: staging, VolumeCapability: capability()}); err != nil {
		return fmt.Errorf("staging %s: %w", volume, err)
	}
	defer func() {
		ctx := context.WithoutCancel(ctx) // also when it was interrupted
		_, unpublishErr := d.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: device})
		_, unstageErr := d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: staging})
		err = errors.Join(err, unpublishErr, unstageErr)
		if err == nil {
			err = errors.Join(os.Remove(staging), os.Remove(dir))
		}
	}()
	if _, err := d.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: volume, StagingTargetPath: staging, TargetPath: device, VolumeCapability: capability()}); err != nil {
		return fmt.Errorf("publishing %s: %w", volume, err)
	}
	return with(device)
}

func (d *driver) deleteVolume(ctx context.Context, id string) error {
	_, err := d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

func (d *driver) deleteSnapshot(ctx context.Context, id string) error {
	if id == "" {
		return nil
	}
	_, err := d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}
