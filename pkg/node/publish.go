package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// NodePublishVolume implements csi.NodeServer: it binds the staged filesystem,
// or the device, to the target path.
func (s *Server) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	target, err := resolve("target_path", r.GetTargetPath())
	if err != nil {
		return nil, asPrecondition(err)
	}
	if r.GetVolumeCapability() == nil {
		return nil, pool.Errorf(pool.ErrInvalid, "volume_capability is missing")
	}
	inline := r.GetVolumeContext()[ephemeralKey] == "true"
	if r.GetStagingTargetPath() == "" && !inline {
		return nil, pool.Errorf(pool.ErrPrecondition, "staging_target_path is missing: the volume must be staged first")
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Publish)
	if err != nil {
		return nil, err
	}
	defer end()
	if inline {
		return &csi.NodePublishVolumeResponse{}, s.publishInline(ctx, r, target)
	}
	staging, err := resolve("staging_target_path", r.GetStagingTargetPath())
	if err != nil {
		return nil, asPrecondition(err)
	}
	engine, v, err := s.pools.Volume(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	capability, err := suit(v, r.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	p := publication{
		limiter:      s.limiter,
		engine:       engine,
		volume:       v,
		target:       target,
		staging:      staging,
		readOnly:     r.GetReadonly() || capability.ReadOnly(),
		singleWriter: capability.SingleWriter(),
	}
	return &csi.NodePublishVolumeResponse{}, p.publish(ctx)
}

// publication is one volume at one target path.
type publication struct {
	limiter         Limiter
	engine          pool.Engine
	volume          pool.Volume
	target, staging string
	readOnly        bool
	singleWriter    bool
}

func (p publication) publish(ctx context.Context) (err error) {
	all, err := uses(p.engine, p.volume.Name)
	if err != nil {
		return err
	}
	staged, published := at(all, p.staging)
	here, elsewhere := at(published, p.target)
	if len(here) > 0 {
		if here[0].ReadOnly != p.readOnly {
			return pool.Errorf(pool.ErrExists, "volume %s is published at %s with another readonly", p.volume.ID, p.target)
		}
		return p.limit(here[0].device)
	}
	if len(elsewhere) > 0 && p.singleWriter {
		return pool.Errorf(pool.ErrPrecondition, "volume %s has a single writer and is published at %s", p.volume.ID, paths(elsewhere))
	}
	if err := mustBeFree(p.target); err != nil {
		return err
	}
	source := p.staging
	var device pool.Device
	switch {
	case p.volume.Access == pool.AccessBlock:
		if device, err = p.device(ctx); err != nil {
			return err
		}
		source = device.Path
		defer func() {
			if err != nil && device.ReadOnly && len(elsewhere) == 0 {
				err = errors.Join(err, p.engine.Detach(ctx, p.volume.Name, device))
			}
		}()
	case len(staged) == 0:
		return pool.Errorf(pool.ErrPrecondition, "volume %s is not staged at %s", p.volume.ID, p.staging)
	default:
		device = staged[0].device
	}
	// Before the pod can have the volume.
	if err := p.limit(device); err != nil {
		return err
	}
	made, err := p.makeTarget()
	if err != nil {
		return err
	}
	if err := filesystem.Bind(source, p.target, p.readOnly); err != nil {
		if made {
			err = errors.Join(err, removeEmpty(p.target))
		}
		return err
	}
	return nil
}

// device gives the device to hand out. Binding a device node read-only does not
// make the device so: a read-only publication has a device of its own that is
// read-only in the kernel.
func (p publication) device(ctx context.Context) (pool.Device, error) {
	devices, err := p.engine.Devices(p.volume.Name)
	if err != nil {
		return pool.Device{}, err
	}
	if len(devices) == 0 || devices[0].ReadOnly {
		return pool.Device{}, pool.Errorf(pool.ErrPrecondition, "volume %s is not staged", p.volume.ID)
	}
	if !p.readOnly {
		return devices[0], nil
	}
	return p.engine.Attach(ctx, p.volume.Name, true)
}

// makeTarget makes what is to be mounted on: a directory, or for a device a
// file.
func (p publication) makeTarget() (made bool, err error) {
	if p.volume.Access == pool.AccessFilesystem {
		err = os.Mkdir(p.target, 0o750)
	} else {
		var f *os.File
		if f, err = os.OpenFile(p.target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			err = f.Close()
		}
	}
	if !errors.Is(err, fs.ErrExist) {
		return err == nil, err
	}
	info, err := os.Lstat(p.target)
	if err != nil {
		return false, err
	}
	if fits := info.IsDir() == (p.volume.Access == pool.AccessFilesystem); !fits || !info.IsDir() && !info.Mode().IsRegular() {
		return false, pool.Errorf(pool.ErrExists, "%s exists and is a %s", p.target, info.Mode().Type())
	}
	return false, nil
}

// NodeUnpublishVolume implements csi.NodeServer. The end of an inline volume's
// publication is the end of the volume.
func (s *Server) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	target, err := resolve("target_path", r.GetTargetPath())
	if errors.Is(err, fs.ErrNotExist) {
		target = r.GetTargetPath() // gone with its parent
	} else if err != nil {
		return nil, err
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Unpublish)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, name, err := s.pools.Locate(r.GetVolumeId())
	if errors.Is(err, pool.ErrNotFound) {
		// It may be an inline volume whose end was reached before.
		return &csi.NodeUnpublishVolumeResponse{}, leave(target, err)
	}
	if err != nil {
		return nil, err
	}
	all, err := uses(engine, name)
	if err != nil {
		return nil, err
	}
	here, elsewhere := at(all, target)
	if err := unmount(ctx, here, target); err != nil {
		return nil, err
	}
	if len(here) == 0 {
		if err := unmountLost(ctx, target); err != nil {
			return nil, err
		}
	}
	if err := s.lift(engine, name, here, elsewhere); err != nil {
		return nil, err
	}
	if err := leave(target, pool.Errorf(pool.ErrPrecondition, "%s has something mounted on it that is not volume %s", target, r.GetVolumeId())); err != nil {
		return nil, err
	}
	if v, err := engine.Volume(name); err == nil && v.Ephemeral {
		return &csi.NodeUnpublishVolumeResponse{}, endInline(ctx, engine, name)
	}
	return &csi.NodeUnpublishVolumeResponse{}, detachReadOnly(ctx, engine, name, elsewhere)
}

// unmountLost takes away what a block volume has left at a target path when
// somebody else has detached its device: a device node that nobody can use.
func unmountLost(ctx context.Context, target string) error {
	table, err := filesystem.ReadTable()
	if err != nil {
		return err
	}
	for _, node := range table.DeviceNodes() {
		if node.Path == target && isLoop(node.Number) && hollow(node.Number) {
			return filesystem.Unmount(ctx, target)
		}
	}
	return nil
}

// hollow reports whether a device has not a single byte, as a loop device that
// is bound to nothing.
func hollow(number uint64) bool {
	size, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/size", unix.Major(number), unix.Minor(number)))
	return errors.Is(err, fs.ErrNotExist) || err == nil && strings.TrimSpace(string(size)) == "0"
}

// leave removes the target path. If something is mounted there, the answer is
// mounted.
func leave(target string, mounted error) error {
	_, err := filesystem.MountAt(target)
	switch {
	case errors.Is(err, filesystem.ErrNotMounted):
		return removeEmpty(target)
	case err != nil:
		return err
	}
	return mounted
}

// detachReadOnly takes the read-only device away once nobody has it.
func detachReadOnly(ctx context.Context, engine pool.Engine, name string, remaining []use) error {
	for _, u := range remaining {
		if u.device.ReadOnly {
			return nil
		}
	}
	devices, err := engine.Devices(name)
	if err != nil {
		return err
	}
	for _, d := range devices {
		if d.ReadOnly {
			return engine.Detach(ctx, name, d)
		}
	}
	return nil
}
