// Package cgroup finds the control groups of pods, stops the processes in them
// for a moment, and limits what the containers of a pod do on a block device, by
// the kernel's block I/O controller: "io" of cgroup v2 (cgroups(7),
// Documentation/admin-guide/cgroup-v2.rst), or "blkio" on hosts that still have
// the hierarchies of version 1 (admin-guide/cgroup-v1/blkio-controller.rst).
//
// It finds the cgroups that the kubelet and the container runtime have made,
// and writes limits and the freezer's state into them. It makes and removes none,
// moves no process, and remembers no limit: the kernel does.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

var (
	// ErrUnsupported says that there is no cgroup hierarchy here that could
	// limit I/O.
	ErrUnsupported = errors.New("no cgroup hierarchy with a block I/O controller is mounted here")
	// ErrNoPod says that a pod has no cgroup, or none that can be seen here.
	ErrNoPod = errors.New("has no cgroup here")
)

// Limits bounds what the processes of a cgroup do on one device. Zero is no
// limit.
type Limits struct {
	ReadIOPS, WriteIOPS           int64 // operations a second
	ReadBandwidth, WriteBandwidth int64 // bytes a second
}

// group is the cgroup of a pod.
type group struct {
	dir     string
	unified bool // of cgroup v2
}

// find finds the cgroup of a pod.
func find(pod string) (group, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return group{}, fmt.Errorf("read mountinfo: %w", err)
	}
	// A controller is in one hierarchy only, and what is mounted of version 1
	// has it.
	unified := !slices.ContainsFunc(mounts, isBlkio)
	supported := false
	for _, m := range mounts {
		if unified && !hasIO(m) || !unified && !isBlkio(m) {
			continue
		}
		supported = true
		dir, err := findBelow(m.Mountpoint, pod)
		if err != nil {
			return group{}, err
		}
		if dir != "" {
			return group{dir, unified}, nil
		}
	}
	if !supported {
		return group{}, ErrUnsupported
	}
	return group{}, fmt.Errorf("pod %s %w: it has not begun or has ended, or the host's /sys/fs/cgroup is not mounted for the driver", pod, ErrNoPod)
}

func isBlkio(m *mountinfo.Info) bool {
	return m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), "blkio")
}

func hasIO(m *mountinfo.Info) bool {
	if m.FSType != "cgroup2" {
		return false
	}
	controllers, err := os.ReadFile(filepath.Join(m.Mountpoint, "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(controllers)), "io")
}

// findBelow finds the directory of a pod's cgroup; empty if there is none. The
// kubelet's two drivers of cgroups call it pod<uid>, and
// kubepods-burstable-pod<uid>.slice with "_" for "-", in a directory for the
// pod's class of service or not, and all of it below a root that can be
// configured (k8s.io/kubernetes/pkg/kubelet/cm, GetPodContainerName and
// ToSystemd).
func findBelow(root, pod string) (found string, err error) {
	slice := "-pod" + strings.ReplaceAll(pod, "-", "_") + ".slice"
	err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch name := filepath.Base(path); {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV):
			return nil // it has ended meanwhile
		case err != nil:
			return err
		case !entry.IsDir() || path == root:
			return nil
		case name == "pod"+pod, strings.HasSuffix(name, slice):
			found = path
			return filepath.SkipAll
		case isPod(name, filepath.Base(filepath.Dir(path))):
			return filepath.SkipDir // another's
		}
		return nil
	})
	return found, err
}

// isPod reports whether a cgroup in a directory of that name is a pod's.
func isPod(name, parent string) bool {
	if strings.HasSuffix(name, ".slice") {
		return strings.Contains(name, "kubepods-") && strings.Contains(name, "-pod")
	}
	return strings.HasPrefix(name, "pod") && slices.Contains([]string{"kubepods", "burstable", "besteffort"}, parent)
}

// limit sets the limits of the group's processes on a device.
func (g group) limit(device uint64, l Limits) error {
	if g.unified {
		return limitUnified(g.dir, device, l)
	}
	return limitTree(g.dir, device, l)
}

// number is how cgroup files call a device.
func number(device uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(device), unix.Minor(device))
}
