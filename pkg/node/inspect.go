package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// locate finds a volume and its uses at a path; that there are none is
// pool.ErrNotFound.
func (s *Server) locate(volumeID, field, path string) (pool.Engine, pool.Volume, []use, error) {
	if err := request.Required("volume_id", volumeID); err != nil {
		return nil, pool.Volume{}, nil, err
	}
	if err := request.Required(field, path); err != nil {
		return nil, pool.Volume{}, nil, err
	}
	engine, v, err := s.pools.Volume(volumeID)
	if err != nil {
		return nil, pool.Volume{}, nil, err
	}
	// What cannot be a path has no volume (csi-sanity asks for "some/path").
	resolved, err := resolve(field, path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, pool.ErrInvalid) {
		return nil, pool.Volume{}, nil, err
	}
	all, err := uses(engine, v.Name)
	if err != nil {
		return nil, pool.Volume{}, nil, err
	}
	here, _ := at(all, resolved)
	if len(here) == 0 {
		return nil, pool.Volume{}, nil, pool.Errorf(pool.ErrNotFound, "volume %s is not at %s", v.ID, path)
	}
	return engine, v, here, nil
}

// NodeExpandVolume implements csi.NodeServer: the device and the filesystem
// follow the size that ControllerExpandVolume gave the volume.
func (s *Server) NodeExpandVolume(ctx context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Grow)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, v, here, err := s.mountedOrStaged(r)
	if err != nil {
		return nil, err
	}
	wanted, limit, err := request.Size(r.GetCapacityRange(), pool.SizeUnit, v.Size)
	if err != nil {
		return nil, err
	}
	if wanted > v.Size || limit > 0 && v.Size > limit {
		return nil, pool.Errorf(pool.ErrOutOfRange, "volume %s has %d bytes, which is outside of the capacity_range; ControllerExpandVolume sets a volume's size", v.ID, v.Size)
	}
	devices, err := engine.Devices(v.Name)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if _, err := engine.Attach(ctx, v.Name, d.ReadOnly); err != nil {
			return nil, err
		}
	}
	if v.Access == pool.AccessFilesystem {
		if err := grow(ctx, v, here.Path); err != nil {
			return nil, err
		}
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.Size}, nil
}

// mountedOrStaged finds where a filesystem can be grown: through a read-only
// bind it cannot be, so that any other mount of it is better. A block volume
// need only be staged.
func (s *Server) mountedOrStaged(r *csi.NodeExpandVolumeRequest) (pool.Engine, pool.Volume, use, error) {
	engine, v, here, err := s.locate(r.GetVolumeId(), "volume_path", r.GetVolumePath())
	if errors.Is(err, pool.ErrNotFound) {
		if staged, vol, volErr := s.pools.Volume(r.GetVolumeId()); volErr == nil && vol.Access == pool.AccessBlock {
			devices, err := staged.Devices(vol.Name)
			if err != nil {
				return nil, pool.Volume{}, use{}, err
			}
			if len(devices) > 0 && r.GetVolumePath() == r.GetStagingTargetPath() {
				return staged, vol, use{device: devices[0]}, nil
			}
		}
	}
	if err != nil {
		return nil, pool.Volume{}, use{}, err
	}
	if here[0].ReadOnly && v.Access == pool.AccessFilesystem {
		all, err := uses(engine, v.Name)
		if err != nil {
			return nil, pool.Volume{}, use{}, err
		}
		if i := slices.IndexFunc(all, func(u use) bool { return !u.ReadOnly }); i >= 0 {
			return engine, v, all[i], nil
		}
	}
	return engine, v, here[0], nil
}

// NodeGetVolumeStats implements csi.NodeServer.
func (s *Server) NodeGetVolumeStats(ctx context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	_, v, here, err := s.locate(r.GetVolumeId(), "volume_path", r.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if v.Access == pool.AccessBlock {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: v.Size}}}, nil
	}
	usage, err := filesystem.Stat(ctx, here[0].Path)
	if err != nil {
		return nil, fmt.Errorf("statistics of volume %s: %w", v.ID, err)
	}
	response := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{
		Unit: csi.VolumeUsage_BYTES, Total: usage.Bytes.Total, Used: usage.Bytes.Used, Available: usage.Bytes.Available,
	}}}
	if usage.Inodes.Total > 0 { // btrfs makes them as they are needed
		response.Usage = append(response.Usage, &csi.VolumeUsage{
			Unit: csi.VolumeUsage_INODES, Total: usage.Inodes.Total, Used: usage.Inodes.Used, Available: usage.Inodes.Available,
		})
	}
	return response, nil
}

// NodeGetVolumeHealth implements csi.NodeServer: what is wrong with the volume
// in its pool, and with its filesystem where it is mounted.
func (s *Server) NodeGetVolumeHealth(ctx context.Context, r *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	engine, name, err := s.pools.Locate(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	published, err := resolve("volume_publish_path", r.GetVolumePublishPath())
	if err != nil {
		published = "" // it is there to look at, not to work with
	}
	conditions, err := health(ctx, engine, []string{name}, map[string]string{published: name})
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: request.Health(r.GetVolumeId(), conditions[name])}, nil
}

// VolumesHealth is a [pool.VolumesHealth]: what is wrong with volumes in their
// pool, and where they are mounted or handed out.
func (*Server) VolumesHealth(ctx context.Context, engine pool.Engine, names []string) (map[string][]pool.Condition, error) {
	return health(ctx, engine, names, nil)
}

// health asks the kernel once for all volumes. published tells, by target path,
// the names of volumes that are known to be published there.
func health(ctx context.Context, engine pool.Engine, names []string, published map[string]string) (map[string][]pool.Condition, error) {
	all, err := engine.VolumesHealth(ctx, names)
	if err != nil {
		return nil, err
	}
	devices, err := engine.Attached(names)
	if err != nil {
		return nil, err
	}
	table, err := filesystem.ReadTable()
	if err != nil {
		return nil, err
	}
	lost := lostDevices(engine, devices, table, published)
	for _, name := range names {
		if lost[name] {
			all[name] = append(all[name], deviceLost)
		}
		for _, d := range devices[name] {
			mounts, nodes, err := table.UsesOf(d.Number)
			if err != nil {
				return nil, err
			}
			condition, wrong := inspectAny(ctx, append(mounts, nodes...), d)
			if wrong {
				all[name] = append(all[name], condition)
				break // the other mounts are of the same filesystem
			}
		}
	}
	return all, nil
}

// deviceLost is that a pod has a device node that is no longer the volume's: the
// device was detached by somebody else while nobody had it open.
var deviceLost = pool.Condition{Severity: pool.Inaccessible, Reason: "DeviceLost", Message: "somebody has detached the loop device that its user has; stop the user and start it again"}

// lostDevices finds the block volumes that are published with a device that is
// not theirs any more. Which volume that was, its target path tells.
func lostDevices(engine pool.Engine, devices map[string][]pool.Device, table *filesystem.Table, published map[string]string) map[string]bool {
	lost := map[string]bool{}
	for _, node := range table.DeviceNodes() {
		name, known := published[node.Path]
		if !known {
			v, err := engine.Volume(pool.NameFor(volumeOf(node.Path)))
			if err != nil || v.Access != pool.AccessBlock || v.RequestName != volumeOf(node.Path) {
				continue
			}
			name = v.Name
		}
		own := slices.ContainsFunc(devices[name], func(d pool.Device) bool { return d.Number == node.Number })
		if !own && isLoop(node.Number) {
			lost[name] = true
		}
	}
	return lost
}

// isLoop tells the number of a loop device (LOOP_MAJOR of
// include/uapi/linux/major.h).
func isLoop(number uint64) bool { return unix.Major(number) == 7 }

func inspectAny(ctx context.Context, mounts []filesystem.MountPoint, d pool.Device) (condition pool.Condition, wrong bool) {
	for _, m := range mounts {
		if condition, wrong = inspect(ctx, use{m, d}); wrong {
			return condition, true
		}
	}
	return condition, false
}

// inspect finds out whether a mounted filesystem has given up: after an error
// it becomes read-only as a whole though its mount is not, or it answers with
// errors.
func inspect(ctx context.Context, u use) (condition pool.Condition, wrong bool) {
	info, err := os.Lstat(u.Path)
	if err == nil && !info.IsDir() {
		return condition, false // a device node
	}
	if u.SuperReadOnly && !u.ReadOnly {
		return pool.Condition{Severity: pool.Inaccessible, Reason: "FilesystemReadOnly", Message: "the filesystem went read-only after an error; see the kernel log, stop its user and start it again, which checks it"}, true
	}
	if err == nil { // an XFS that was shut down fails the first alone
		_, err = filesystem.Stat(ctx, u.Path)
	}
	if u.Failed {
		err = errors.Join(errors.New("the filesystem was shut down after an error"), err)
	}
	if err != nil {
		return pool.Condition{Severity: pool.Inaccessible, Reason: "FilesystemFailed", Message: fmt.Sprintf("the filesystem fails; see the kernel log, stop its user and start it again (%v)", err)}, true
	}
	return condition, false
}

// NodeGetStorageHealth implements csi.NodeServer.
func (s *Server) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	var conditions []pool.Condition
	for _, engine := range s.pools.Engines() {
		conditions = append(conditions, engine.Health(ctx)...)
	}
	return &csi.NodeGetStorageHealthResponse{BackendHealth: request.StorageHealth(conditions)}, nil
}
