// Package node is the CSI Node service: it turns a volume of this node's pools
// into a mounted filesystem or a block device at the path that the orchestrator
// names, and back.
//
// It remembers nothing. What is attached and mounted is read from the kernel at
// each call, so that the driver can be restarted at any time with volumes in
// use. It never removes anything but an empty directory or file at a path that
// it unmounted.
package node

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// capabilities is what the service can do (CSI spec v1.13.0,
// NodeServiceCapability).
var capabilities = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
	csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
}

// Server implements csi.NodeServer over the pools of one node.
type Server struct {
	csi.UnimplementedNodeServer

	pools   *pool.Set
	limiter Limiter
	segment string // the node's topology segment
}

// New makes the service.
func New(pools *pool.Set, limiter Limiter) (*Server, error) {
	segment, err := pool.NodeSegment(pools.Node())
	if err != nil {
		return nil, err
	}
	return &Server{pools: pools, limiter: limiter, segment: segment}, nil
}

// NodeGetCapabilities implements csi.NodeServer.
func (s *Server) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	response := &csi.NodeGetCapabilitiesResponse{}
	for _, c := range capabilities {
		response.Capabilities = append(response.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: c}},
		})
	}
	return response, nil
}

// NodeGetInfo implements csi.NodeServer. There is no limit to the volumes of a
// node: the kernel makes loop devices as they are needed.
func (s *Server) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.pools.Node(),
		AccessibleTopology: &csi.Topology{Segments: map[string]string{request.TopologyKey: s.segment}},
	}, nil
}

// resolve checks a path that the orchestrator gave and brings it to the form
// that the kernel's mount table has: its parent's links followed, itself not
// one. If the parent does not exist, the error is fs.ErrNotExist.
func resolve(field, path string) (string, error) {
	if err := request.Required(field, path); err != nil {
		return "", err
	}
	switch {
	case !filepath.IsAbs(path):
		return "", pool.Errorf(pool.ErrInvalid, "%s %.256q is not absolute", field, path)
	case len(path) >= 4096 || strings.ContainsRune(path, 0):
		return "", pool.Errorf(pool.ErrInvalid, "%s is not a path that Linux can have", field)
	case slices.Contains(strings.Split(path, "/"), ".."):
		return "", pool.Errorf(pool.ErrInvalid, "%s %.256q has \"..\" in it", field, path)
	case filepath.Clean(path) == "/":
		return "", pool.Errorf(pool.ErrInvalid, "%s is the root directory", field)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(filepath.Clean(path)))
	if err != nil {
		return "", err
	}
	resolved := filepath.Join(parent, filepath.Base(path))
	if info, err := os.Lstat(resolved); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return "", pool.Errorf(pool.ErrInvalid, "%s %.256q is a symbolic link", field, path)
	}
	return resolved, nil
}

// use is where one device of a volume is mounted or handed out.
type use struct {
	filesystem.MountPoint
	device pool.Device
}

// uses asks the kernel where a volume is mounted (as a filesystem) and bound
// (as a device node).
func uses(engine pool.Engine, name string) ([]use, error) {
	devices, err := engine.Devices(name)
	if err != nil {
		return nil, err
	}
	var all []use
	for _, d := range devices {
		mounts, nodes, err := filesystem.UsesOf(d.Number)
		if err != nil {
			return nil, err
		}
		for _, m := range append(mounts, nodes...) {
			all = append(all, use{m, d})
		}
	}
	return all, nil
}

// at splits uses into those at a path and the others.
func at(all []use, path string) (here, elsewhere []use) {
	for _, u := range all {
		if u.Path == path {
			here = append(here, u)
		} else {
			elsewhere = append(elsewhere, u)
		}
	}
	return here, elsewhere
}

func paths(all []use) string {
	var list []string
	for _, u := range all {
		list = append(list, u.Path)
	}
	return strings.Join(list, ", ")
}

// mustBeFree refuses a path on which something else is mounted.
func mustBeFree(path string) error {
	there, err := filesystem.MountAt(path)
	if errors.Is(err, filesystem.ErrNotMounted) {
		return nil
	}
	if err != nil {
		return err
	}
	return pool.Errorf(pool.ErrExists, "%s has something else mounted on it (%s)", path, there.Source)
}

// removeEmpty removes what was made to mount on: an empty directory or file.
func removeEmpty(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() && info.Size() > 0 {
		return pool.Errorf(pool.ErrPrecondition, "%s is not mounted and holds %d bytes; it was left alone", path, info.Size())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return pool.Errorf(pool.ErrPrecondition, "%w; it was left alone", err)
	}
	return nil
}

// unmount takes everything away that is mounted at a path for a volume.
func unmount(ctx context.Context, here []use, path string) error {
	for range here {
		err := filesystem.Patiently(ctx, func() error { return filesystem.Unmount(ctx, path) })
		if err != nil {
			if errors.Is(err, filesystem.ErrBusy) {
				return pool.Errorf(pool.ErrInUse, "%w: a process has a file or its working directory there", err)
			}
			return err
		}
	}
	return nil
}
