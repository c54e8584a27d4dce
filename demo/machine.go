package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mount is one line of the kernel's mount table.
type mount struct{ path, fsType, source string }

// mountsBelow lists what is mounted at or below a directory, in the order in
// which it was mounted.
func mountsBelow(dir string) ([]mount, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(text), dir), nil
}

// parseMounts picks the mounts below a directory from the text of
// /proc/self/mountinfo (proc_pid_mountinfo(5)).
func parseMounts(text, dir string) []mount {
	var found []mount
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(text) {
		before, after, _ := strings.Cut(line, " - ")
		place, kind := strings.Fields(before), strings.Fields(after)
		if len(place) < 6 || len(kind) < 2 {
			continue
		}
		if path := unescape.Replace(place[4]); within(path, dir) {
			found = append(found, mount{path, kind[0], unescape.Replace(kind[1])})
		}
	}
	return found
}

// mountAt finds what is mounted at a path.
func mountAt(path string) (mount, error) {
	mounts, err := mountsBelow(path)
	if err != nil {
		return mount{}, err
	}
	for _, m := range mounts {
		if m.path == path {
			return m, nil
		}
	}
	return mount{}, fmt.Errorf("nothing is mounted at %s", path)
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// loopsBelow lists the loop devices whose backing file is below a directory.
func loopsBelow(dir string) ([]string, error) {
	all, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, sys := range all {
		if name := filepath.Base(sys); isLoopBelow(name, dir) {
			found = append(found, "/dev/"+name)
		}
	}
	return found, nil
}

// isLoopBelow reports whether a loop device has a backing file below a
// directory. One that is not attached has no such attribute.
func isLoopBelow(name, dir string) bool {
	file, err := os.ReadFile(filepath.Join("/sys/block", name, "loop/backing_file"))
	return err == nil && within(strings.TrimSpace(string(file)), dir)
}

// undo takes away every mount and loop device below a directory. Pools are
// mounted on devices of files, and volumes on devices of files in pools: it
// goes on until nothing more is there.
func undo(dir string) error {
	var failures []error
	for range 100 {
		failures = nil
		mounts, err := mountsBelow(dir)
		if err != nil {
			return err
		}
		for _, m := range slices.Backward(mounts) {
			if err := unix.Unmount(m.path, 0); err != nil {
				failures = append(failures, fmt.Errorf("  %s is mounted: %w", m.path, err))
			}
		}
		loops, err := loopsBelow(dir)
		if err != nil {
			return err
		}
		for _, path := range loops {
			if err := detach(path, dir); err != nil {
				failures = append(failures, fmt.Errorf("  %s is attached: %w", path, err))
			}
		}
		if len(mounts) == 0 && len(loops) == 0 {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.Join(append(failures, fmt.Errorf("  %s", dir))...)
}

// detach detaches a loop device if its backing file is below a directory. That
// is looked at while the device is open, so that it cannot become another's in
// between.
func detach(path, dir string) error {
	device, err := os.Open(path)
	if err != nil {
		return err
	}
	defer device.Close()
	if !isLoopBelow(filepath.Base(path), dir) {
		return nil
	}
	err = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil // somebody else was faster
	}
	return err
}

// fithaw is FITHAW, _IOWR('X', 120, int) in linux/fs.h.
const fithaw = 0xc0045878

// thawBelow thaws every filesystem below a directory, in case a driver that was
// killed left it frozen. One that is not frozen refuses, which is fine.
func thawBelow(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if f, err := os.Open(m.path); err == nil {
			_ = unix.IoctlSetInt(int(f.Fd()), fithaw, 0)
			f.Close()
		}
	}
	return nil
}

// syncFilesystem brings everything of the filesystem at a path to its device.
func syncFilesystem(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("syncfs %s: %w", path, err)
	}
	return nil
}

// blocksOf tells what a file takes on disk, in bytes; nothing if it is not
// there.
func blocksOf(path string) (int64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	return st.Blocks * 512, nil // stat(2): units of 512 bytes, whatever the filesystem
}

// roomIn tells how many bytes the filesystem at a path has room for in all, as
// df does.
func roomIn(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(st.Blocks) * st.Frsize, nil
}

// mayGrowExt4 reports whether this process, and so the driver that it starts,
// may grow ext4 in use. The kernel asks for CAP_SYS_RESOURCE, which root in a
// container may lack (ext4_resize_begin in fs/ext4/resize.c).
func mayGrowExt4() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0, nil
}
