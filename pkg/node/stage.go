package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// toolLimit bounds mkfs, fsck and their like when a call has no deadline.
const toolLimit = 10 * time.Minute

// NodeStageVolume implements csi.NodeServer: it attaches the volume, and for
// filesystem access makes its filesystem if it has none yet, mounts it at the
// staging path and lets it span the volume.
func (s *Server) NodeStageVolume(ctx context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	staging, err := resolve("staging_target_path", r.GetStagingTargetPath())
	if err != nil {
		return nil, asPrecondition(err)
	}
	if r.GetVolumeCapability() == nil {
		return nil, pool.Errorf(pool.ErrInvalid, "volume_capability is missing")
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Stage)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, v, err := s.pools.Volume(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	capability, err := suit(v, r.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	if v.Access == pool.AccessBlock {
		return &csi.NodeStageVolumeResponse{}, stageBlock(ctx, engine, v)
	}
	return &csi.NodeStageVolumeResponse{}, stageFilesystem(ctx, engine, v, staging, capability)
}

// asPrecondition gives a path whose parent is not there its kind: the
// orchestrator makes it.
func asPrecondition(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return pool.Errorf(pool.ErrPrecondition, "%w", err)
	}
	return err
}

// suit checks a capability for a volume. To the node, one that the volume was
// not made for is a precondition (CSI spec, NodeStageVolume errors).
func suit(v pool.Volume, c *csi.VolumeCapability) (request.Capability, error) {
	capability, err := request.Suit(v, c)
	if err != nil {
		return capability, pool.Errorf(pool.ErrPrecondition, "%w", err)
	}
	return capability, nil
}

// asksReadOnly reports whether mount flags ask for a read-only mount; of those
// that contradict each other the last wins (mount(8)).
func asksReadOnly(flags []string) bool {
	readOnly := false
	for word := range strings.SplitSeq(strings.Join(flags, ","), ",") {
		switch word {
		case "ro":
			readOnly = true
		case "rw":
			readOnly = false
		}
	}
	return readOnly
}

func stageBlock(ctx context.Context, engine pool.Engine, v pool.Volume) error {
	if v.Content == pool.ContentEmpty {
		if err := engine.SetContent(ctx, v.Name, pool.ContentRaw); err != nil {
			return err
		}
	}
	_, err := engine.Attach(ctx, v.Name, false)
	return err
}

func stageFilesystem(ctx context.Context, engine pool.Engine, v pool.Volume, staging string, c request.Capability) (err error) {
	readOnly := asksReadOnly(c.MountFlags)
	all, err := uses(engine, v.Name)
	if err != nil {
		return err
	}
	here, elsewhere := at(all, staging)
	switch {
	case len(here) > 0 && here[0].ReadOnly != readOnly:
		return pool.Errorf(pool.ErrExists, "volume %s is staged at %s with other mount options", v.ID, staging)
	case len(here) == 0 && len(elsewhere) > 0:
		return pool.Errorf(pool.ErrPrecondition, "volume %s is mounted elsewhere: %s", v.ID, paths(elsewhere))
	case len(here) == 0:
		if err := mustBeFree(staging); err != nil {
			return err
		}
		if err := os.Mkdir(staging, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := attachAndMount(ctx, engine, v, staging, c.MountFlags, readOnly); err != nil {
			return err
		}
	}
	if readOnly {
		return nil
	}
	// A clone larger than its source, or a growth of a volume that was not
	// mounted. What Grow is not allowed, GrowUnmounted has done before.
	if err := grow(ctx, v, staging); !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}

// grow makes a mounted filesystem span its volume.
func grow(ctx context.Context, v pool.Volume, path string) error {
	err := filesystem.Grow(ctx, path)
	if errors.Is(err, unix.EPERM) {
		return pool.Errorf(pool.ErrPrecondition, "growing the filesystem of volume %s while it is mounted: %w; give the driver that capability, or stop the workload: it grows when it is staged again", v.ID, err)
	}
	if err != nil {
		return fmt.Errorf("growing the filesystem of volume %s: %w", v.ID, err)
	}
	return nil
}

// attachAndMount mounts a volume's filesystem at a path. If it fails, the
// volume is detached again.
func attachAndMount(ctx context.Context, engine pool.Engine, v pool.Volume, path string, flags []string, readOnly bool) (err error) {
	ctx, cancel := context.WithTimeout(ctx, toolLimit)
	defer cancel()
	if v.Content == pool.ContentFormatting {
		if err := zeroAgain(ctx, engine, v); err != nil {
			return err
		}
	}
	if v.Content == pool.ContentGrowing {
		// A killed driver may have left its resize2fs, which has the device
		// open.
		if err := detachAll(ctx, engine, v.Name); err != nil {
			return err
		}
	}
	formats := v.Content == pool.ContentEmpty || v.Content == pool.ContentFormatting
	if formats {
		if err := mustBeBlank(engine, v); err != nil {
			return err
		}
	}
	var device pool.Device
	err = both(func() (err error) {
		device, err = engine.Attach(ctx, v.Name, false)
		return err
	}, func() error {
		if !formats {
			return nil
		}
		return engine.SetContent(ctx, v.Name, pool.ContentFormatting)
	})
	defer func() {
		if err != nil && device.Path != "" {
			err = errors.Join(err, engine.Detach(context.WithoutCancel(ctx), v.Name, device))
		}
	}()
	if err != nil {
		return err
	}
	if err := prepare(ctx, engine, v, device.Path); err != nil {
		return err
	}
	// The record says what is on the volume before anybody can write to it.
	var mount *filesystem.Detached
	err = both(func() (err error) {
		mount, err = filesystem.MountDetached(ctx, device.Path, filesystem.Type(v.Filesystem), flags, readOnly)
		return asOption(err)
	}, func() error { return engine.SetContent(ctx, v.Name, pool.ContentFilesystem) })
	if mount != nil {
		defer mount.Close()
	}
	if err == nil {
		err = mount.Attach(path)
	}
	if err != nil {
		return asDamage(fmt.Errorf("mounting volume %s: %w", v.ID, err))
	}
	return nil
}

// both does two things at once, and gives the errors of both.
func both(one, other func() error) error {
	done := make(chan error, 1)
	go func() { done <- other() }()
	return errors.Join(one(), <-done)
}

// asOption gives an option that the kernel refuses its kind.
func asOption(err error) error {
	if errors.Is(err, filesystem.ErrOption) {
		return pool.Errorf(pool.ErrInvalid, "volume_capability.mount.mount_flags: %w", err)
	}
	return err
}

// asDamage gives a filesystem that only a human may mend its kind.
func asDamage(err error) error {
	if errors.Is(err, filesystem.ErrDamaged) {
		return pool.Errorf(pool.ErrDamaged, "%w; run the filesystem's own repair tool on the volume's image, or restore a snapshot", err)
	}
	return err
}

// zeroAgain undoes a mkfs that was cut off: the volume was never mounted, so
// that nothing in it is anybody's.
func zeroAgain(ctx context.Context, engine pool.Engine, v pool.Volume) error {
	if err := detachAll(ctx, engine, v.Name); err != nil {
		return err
	}
	return engine.Zero(ctx, v.Name)
}

// prepare makes sure that there is a filesystem to mount on the device.
func prepare(ctx context.Context, engine pool.Engine, v pool.Volume, device string) error {
	fsType := filesystem.Type(v.Filesystem)
	switch v.Content {
	case pool.ContentEmpty, pool.ContentFormatting:
		if err := filesystem.Make(ctx, device, fsType, strings.Fields(v.MkfsOptions)); err != nil {
			return fmt.Errorf("formatting volume %s: %w", v.ID, err)
		}
	default:
		if err := mustHave(device, v); err != nil {
			return err
		}
		if v.Content == pool.ContentGrowing {
			if err := filesystem.Repair(ctx, device); err != nil {
				return asDamage(fmt.Errorf("repairing volume %s, whose growth was cut off: %w", v.ID, err))
			}
		}
		if v.Content == pool.ContentCopied || v.Content == pool.ContentGrowing { // which may be a copy, too
			if err := filesystem.RenewUUID(ctx, device, fsType); err != nil {
				return fmt.Errorf("giving the copy %s an identity of its own: %w", v.ID, err)
			}
		}
		if err := filesystem.Check(ctx, device, fsType); err != nil {
			return asDamage(fmt.Errorf("checking volume %s: %w", v.ID, err))
		}
		if err := growUnmounted(ctx, engine, v, device); err != nil {
			return asDamage(fmt.Errorf("growing the filesystem of volume %s: %w", v.ID, err))
		}
	}
	return nil
}

// growUnmounted makes a filesystem as large as its device where that cannot be
// done when it is mounted. What is cut off in it is repaired before the next use,
// and must be known until then; but what was damaged before is a human's.
func growUnmounted(ctx context.Context, engine pool.Engine, v pool.Volume, device string) error {
	grows, err := filesystem.GrowsUnmounted(device, filesystem.Type(v.Filesystem))
	if err != nil || !grows {
		return err
	}
	if err := filesystem.CheckWhole(ctx, device); err != nil {
		return err
	}
	if err := engine.SetContent(ctx, v.Name, pool.ContentGrowing); err != nil {
		return err
	}
	return filesystem.GrowUnmounted(ctx, device)
}

// mustBeBlank refuses to make a filesystem on what is not provably blank: an image
// that was never written, or that zeroAgain has zeroed.
func mustBeBlank(engine pool.Engine, v pool.Volume) error {
	blank, err := engine.Blank(v.Name)
	if err != nil {
		return err
	}
	if !blank {
		return pool.Errorf(pool.ErrPrecondition, "volume %s has data on it that the driver did not write; it was not formatted", v.ID)
	}
	return nil
}

// mustHave refuses a device that has not the filesystem that the volume should
// have.
func mustHave(device string, v pool.Volume) error {
	info, err := filesystem.Probe(device)
	switch {
	case errors.Is(err, filesystem.ErrNone):
		return pool.Errorf(pool.ErrPrecondition, "volume %s has data on it but no filesystem (it may be a copy of a block volume); it was not formatted", v.ID)
	case err != nil:
		return err
	case string(info.Type) != v.Filesystem:
		return pool.Errorf(pool.ErrPrecondition, "volume %s has %s on it, not %s", v.ID, info.Type, v.Filesystem)
	}
	return nil
}

// NodeUnstageVolume implements csi.NodeServer.
func (s *Server) NodeUnstageVolume(ctx context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	staging, err := resolve("staging_target_path", r.GetStagingTargetPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Unstage)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, name, err := s.pools.Locate(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	all, err := uses(engine, name)
	if err != nil {
		return nil, err
	}
	here, elsewhere := at(all, staging)
	if len(elsewhere) > 0 {
		return nil, pool.Errorf(pool.ErrInUse, "volume %s is still published at %s", r.GetVolumeId(), paths(elsewhere))
	}
	if err := unmount(ctx, here, staging); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, detachAll(ctx, engine, name)
}

// detachAll detaches a volume until the kernel knows of no device any more.
func detachAll(ctx context.Context, engine pool.Engine, name string) error {
	for {
		devices, err := engine.Devices(name)
		if err != nil || len(devices) == 0 {
			return err
		}
		for _, d := range devices {
			if err := engine.Detach(ctx, name, d); err != nil {
				return err
			}
		}
	}
}
