package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// throttle is the files of version 1 and the limit in each. A line of them is
// the number of a device and its limit; 0 lifts it.
var throttle = []struct {
	file  string
	value func(Limits) int64
}{
	{"blkio.throttle.read_iops_device", func(l Limits) int64 { return l.ReadIOPS }},
	{"blkio.throttle.write_iops_device", func(l Limits) int64 { return l.WriteIOPS }},
	{"blkio.throttle.read_bps_device", func(l Limits) int64 { return l.ReadBandwidth }},
	{"blkio.throttle.write_bps_device", func(l Limits) int64 { return l.WriteBandwidth }},
}

// limitTree sets limits in version 1, where those of a cgroup do not hold for
// the cgroups in it: each must have them. It begins at the top, of which a
// cgroup that is made meanwhile takes them over; see [inherit].
func limitTree(dir string, device uint64, l Limits) error {
	return walk(dir, func(path string) error { return limitOne(path, device, l) })
}

// walk does something to a cgroup and then to all in it, but for those that end
// meanwhile.
func walk(dir string, do func(path string) error) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			return nil
		}
		if err == nil {
			err = do(path)
		}
		if path != dir && isGone(err) {
			return fs.SkipDir
		}
		return err
	})
}

func limitOne(dir string, device uint64, l Limits) error {
	for _, t := range throttle {
		if err := setThrottle(filepath.Join(dir, t.file), number(device), t.value(l)); err != nil {
			return err
		}
	}
	return nil
}

func setThrottle(file, device string, limit int64) error {
	now, err := readThrottle(file)
	if err != nil || now[device] == limit {
		return err
	}
	return write(file, fmt.Sprintf("%s %d", device, limit))
}

// readThrottle reads the limits in a file, by device.
func readThrottle(file string) (map[string]int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	limits := map[string]int64{}
	for line := range strings.Lines(string(text)) {
		device, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if limits[device], err = strconv.ParseInt(value, 10, 64); err != nil {
			return nil, fmt.Errorf("%s has %q: %w", file, line, err)
		}
	}
	return limits, nil
}

// isGone reports whether an error says that the cgroup has been removed.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

// inherit gives a cgroup of version 1 the limits of the one that it is in, on
// loop devices. Those may change while it does so. It looks again until they
// have not; whoever changes them later finds the cgroup.
func inherit(dir string) error {
	for _, t := range throttle {
		above, own := filepath.Join(filepath.Dir(dir), t.file), filepath.Join(dir, t.file)
		for {
			same, err := copyThrottle(above, own)
			if err != nil {
				return err
			}
			if same {
				break
			}
		}
	}
	return nil
}

// loopDevices begins the number of every loop device (LOOP_MAJOR of
// include/uapi/linux/major.h).
const loopDevices = "7:"

// copyThrottle copies the limits on loop devices from one file to the other;
// same says that there was nothing to copy.
func copyThrottle(from, to string) (same bool, err error) {
	want, err := readThrottle(from)
	if err != nil {
		return false, err
	}
	have, err := readThrottle(to)
	if err != nil {
		return false, err
	}
	same = true
	for device := range have {
		if _, ok := want[device]; !ok {
			want[device] = 0
		}
	}
	for device, limit := range want {
		if have[device] == limit || !strings.HasPrefix(device, loopDevices) {
			continue
		}
		same = false
		if err := write(to, fmt.Sprintf("%s %d", device, limit)); err != nil {
			return false, err
		}
	}
	return same, nil
}
