package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// hierarchies are where cgroups are mounted: each controller on its own with
// version 1, all together with version 2.
func hierarchies() (directories []string, unified bool, err error) {
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return []string{root}, true, nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, false, err
	}
	for _, entry := range entries {
		if entry.IsDir() { // a link is another name of one
			directories = append(directories, filepath.Join(root, entry.Name()))
		}
	}
	return directories, false, nil
}

// makeCgroups makes the cgroup of a node, below the cluster's, in which its kubelet makes those of the pods.
func makeCgroups(node string) error {
	directories, unified, err := hierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range directories {
		parent := hierarchy
		for _, child := range []string{clusterName, node} {
			dir := filepath.Join(parent, child)
			if unified {
				if err := delegate(parent); err != nil {
					return err
				}
			}
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
			// A new cpuset is empty, and nothing can run in it.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				value, err := os.ReadFile(filepath.Join(parent, file))
				if unified || errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, file), value, 0o644)
				}
				if err != nil {
					return fmt.Errorf("make cgroup: %w", err)
				}
			}
			parent = dir
		}
	}
	return nil
}

// delegate lets the children of a cgroup have all its controllers.
func delegate(dir string) error {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read cgroup: %w", err)
	}
	for controller := range strings.FieldsSeq(string(controllers)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644); err != nil {
			return fmt.Errorf("delegate cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

// removeCgroups removes the cgroups of all nodes. What ran in them must have ended.
func removeCgroups(ctx context.Context) error {
	directories, _, err := hierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range directories {
		root := filepath.Join(hierarchy, clusterName)
		// A process that has ended leaves its cgroup a moment later.
		if err := poll(ctx, time.Minute, root+" to be removed", func(context.Context) error {
			return removeTree(root)
		}); err != nil {
			return err
		}
	}
	return nil
}

// removeTree removes directories from the leaves up. A cgroup's files go with it.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		processes, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		return fmt.Errorf("remove %s (processes %s): %w", dir, bytes.Fields(processes), err)
	}
	return nil
}
