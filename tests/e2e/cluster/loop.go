package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// inode names a file, whatever its paths are: a backing file's path is that of a
// mount namespace which may be gone.
type inode struct{ device, number uint64 }

// loops gives the loop devices (/dev/loopN) whose backing file is in a directory,
// or in a filesystem on such a device, or such a device itself, as with those that
// a kubelet makes to hold block volumes; the ones that stand on others first.
func loops(directory string) ([]string, error) {
	files := map[inode]bool{}
	err := filepath.WalkDir(directory, func(_ string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		files[inode{stat.Dev, stat.Ino}] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	attached, err := attachedLoops()
	if err != nil {
		return nil, err
	}
	var found []string
	devices := map[uint64]bool{} // those found, by number
	for {
		more := false
		for path, loop := range attached {
			if !devices[loop.number] && (files[loop.backing] || devices[loop.backing.device] || devices[loop.device]) {
				devices[loop.number] = true
				found = append([]string{path}, found...)
				more = true
			}
		}
		if !more {
			return found, nil
		}
	}
}

type loop struct {
	number  uint64 // the device's own
	backing inode
	device  uint64 // that the backing file is, or 0
}

func attachedLoops() (map[string]loop, error) {
	found := map[string]loop{}
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		device := filepath.Join("/dev", strings.Split(path, "/")[3])
		file, err := os.Open(device)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		status, err := unix.IoctlLoopGetStatus64(int(file.Fd()))
		file.Close()
		if errors.Is(err, unix.ENXIO) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read status of %s: %w", device, err)
		}
		var stat unix.Stat_t
		if err := unix.Stat(device, &stat); err != nil {
			return nil, err
		}
		found[device] = loop{number: stat.Rdev, backing: inode{status.Device, status.Inode}, device: status.Rdevice}
	}
	return found, nil
}

// detachLoops detaches the loop devices of a directory, of which nothing may be
// mounted any more, and waits until they are gone.
func detachLoops(ctx context.Context, directory string) error {
	return poll(ctx, time.Minute, "loop devices to be detached", func(context.Context) error {
		devices, err := loops(directory)
		if err != nil || len(devices) == 0 {
			return err
		}
		for _, device := range devices {
			file, err := os.Open(device)
			if err != nil {
				return err
			}
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.LOOP_CLR_FD, 0)
			file.Close() // the last close detaches it, if it is still mounted now
			if errno != 0 && errno != unix.ENXIO {
				return fmt.Errorf("detach %s: %w", device, errno)
			}
		}
		// What is on a detached device shows no more; look again.
		return errors.New(strconv.Itoa(len(devices)) + " to go: " + strings.Join(devices, " "))
	})
}
