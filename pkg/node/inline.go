package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"io/fs"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// ephemeralKey marks the publication of a CSI inline volume, which has been
// neither created nor staged (Kubernetes, CSI inline volumes).
const ephemeralKey = "csi.storage.k8s.io/ephemeral"

// publishInline makes a volume that lives and dies with a pod, and mounts it at
// the target. Its ID is the orchestrator's.
func (s *Server) publishInline(ctx context.Context, r *csi.NodePublishVolumeRequest, target string) (err error) {
	capability, err := request.ParseCapability(r.GetVolumeCapability())
	if err != nil {
		return err
	}
	if capability.Access != pool.AccessFilesystem {
		return pool.Errorf(pool.ErrInvalid, "an inline volume has filesystem access")
	}
	if _, err := pool.ParseID(r.GetVolumeId()); err == nil {
		return pool.Errorf(pool.ErrInvalid, "volume_id %s is that of a persistent volume; an inline one has its own", r.GetVolumeId())
	}
	parameters, err := request.ParseInlineParameters(r.GetVolumeContext())
	if err != nil {
		return err
	}
	fsType, mkfs, err := request.Layout(capability, parameters)
	if err != nil {
		return err
	}
	size, _, err := request.Size(&csi.CapacityRange{RequiredBytes: parameters.Size}, fsType.MinSize(), request.DefaultSize)
	if err != nil {
		return err
	}
	engine, err := s.inlineEngine(r.GetVolumeId(), parameters.Pool)
	if err != nil {
		return err
	}
	v, err := engine.CreateVolume(ctx, pool.VolumeSpec{
		ID:           r.GetVolumeId(),
		RequestName:  r.GetVolumeId(),
		Size:         size,
		Provisioning: parameters.Provisioning,
		Access:       pool.AccessFilesystem,
		Filesystem:   string(fsType),
		MkfsOptions:  strings.Join(mkfs, " "),
		Ephemeral:    true,
	})
	if err != nil {
		return err
	}
	all, err := uses(engine, v.Name)
	if err != nil {
		return err
	}
	here, elsewhere := at(all, target)
	switch {
	case len(elsewhere) > 0:
		return pool.Errorf(pool.ErrPrecondition, "inline volume %s is published at %s", v.ID, paths(elsewhere))
	case len(here) > 0 && here[0].ReadOnly != r.GetReadonly():
		return pool.Errorf(pool.ErrExists, "inline volume %s is published at %s with another readonly", v.ID, target)
	case len(here) > 0:
		return nil
	}
	defer func() {
		if err != nil { // nobody has ever seen it
			err = errors.Join(err, removeEmpty(target), endInline(context.WithoutCancel(ctx), engine, v.Name))
		}
	}()
	if err := mustBeFree(target); err != nil {
		return err
	}
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return attachAndMount(ctx, engine, v, target, capability.MountFlags, r.GetReadonly())
}

// inlineEngine finds the pool of an inline volume: the one that has it, or the
// one that the attributes name.
func (s *Server) inlineEngine(id, poolName string) (pool.Engine, error) {
	engine, v, err := s.pools.VolumeNamed(id)
	if errors.Is(err, pool.ErrNotFound) {
		return s.pools.Engine(poolName)
	}
	if err != nil {
		return nil, err
	}
	if !v.Ephemeral {
		return nil, pool.Errorf(pool.ErrExists, "volume %s exists and is not an inline volume", v.ID)
	}
	return engine, nil
}

// endInline detaches an inline volume and deletes it.
func endInline(ctx context.Context, engine pool.Engine, name string) error {
	if err := detachAll(ctx, engine, name); err != nil {
		return err
	}
	if err := engine.DeleteVolume(ctx, name); err != nil {
		return fmt.Errorf("deleting inline volume: %w", err)
	}
	return nil
}
