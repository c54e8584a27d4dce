package filesystem

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MountPoint is one line of /proc/self/mountinfo: see proc_pid_mountinfo(5).
type MountPoint struct {
	ID     int    // unique among the mounts of the moment
	Path   string // where it is mounted
	Root   string // what of the filesystem is mounted there: "/" is all
	Type   string // of the filesystem, by the kernel's name
	Source string // what was mounted; for ext4, XFS and btrfs the path of a device

	// Device is the number (dev_t) of the filesystem's device. For btrfs,
	// whose files have a number of the kernel's making, it is that of Source,
	// or 0 if there is no such device node here.
	Device uint64

	ReadOnly      bool // this mount
	SuperReadOnly bool // the filesystem, however it is mounted
	Failed        bool // an ext4 that was shut down: all it answers is errors
}

// mountTable is where the kernel lists the mounts of this process's mount
// namespace: proc_pid_mountinfo(5).
const mountTable = "/proc/self/mountinfo"

// Mounts lists what is mounted in this process's mount namespace. A mount may
// be covered by another at the same path or above it.
func Mounts() ([]MountPoint, error) {
	table, err := os.ReadFile(mountTable)
	if err != nil {
		return nil, err
	}
	return parseMounts(table)
}

// parseMounts parses lines of mountTable.
func parseMounts(lines []byte) ([]MountPoint, error) {
	infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(lines), nil)
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	mounts := make([]MountPoint, len(infos))
	for i, info := range infos {
		mounts[i] = MountPoint{
			ID:       info.ID,
			Path:     info.Mountpoint,
			Root:     info.Root,
			Type:     info.FSType,
			Source:   info.Source,
			Device:   unix.Mkdev(uint32(info.Major), uint32(info.Minor)),
			ReadOnly: hasOption(info.Options, "ro"),
			// The second is how newer kernels (6.18 is one) tell of an ext4
			// that gave up after an error.
			SuperReadOnly: hasOption(info.VFSOptions, "ro") || hasOption(info.VFSOptions, "emergency_ro"),
			Failed:        hasOption(info.VFSOptions, "shutdown"),
		}
		if info.FSType == string(Btrfs) {
			mounts[i].Device, _ = deviceNumber(info.Source)
		}
	}
	return mounts, nil
}

// MountAt returns what is mounted at exactly path, the topmost if there are
// several, or ErrNotMounted; also where there is nothing at path. The last
// element of path is not followed if it is a symbolic link, those before are.
func MountAt(path string) (MountPoint, error) {
	id, err := mountID(path)
	if err != nil {
		return MountPoint{}, err
	}
	mounts, err := Mounts()
	if err != nil {
		return MountPoint{}, err
	}
	i := slices.IndexFunc(mounts, func(m MountPoint) bool { return m.ID == id })
	if i < 0 {
		return MountPoint{}, fmt.Errorf("%s: %w any more", path, ErrNotMounted)
	}
	return mounts[i], nil
}

// mountID asks the kernel and not the list of mounts, in which a path stands as
// it was when it was mounted, and whose order tells nothing of what covers what.
func mountID(path string) (int, error) {
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, flags, unix.STATX_MNT_ID, &stat)
	if err == unix.ENOENT {
		return 0, fmt.Errorf("%s: %w: %w", path, ErrNotMounted, err)
	}
	if err != nil {
		return 0, fmt.Errorf("statx %s: %w", path, err)
	}
	if stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return 0, fmt.Errorf("%s: %w", path, ErrNotMounted)
	}
	return int(stat.Mnt_id), nil
}

// UsesOf finds what this process's mount namespace does with the block device
// of that number (dev_t): the mounts of its filesystem, and the bind mounts of
// its device node in /dev. It knows nothing of other namespaces, nor of who has
// the device open: only an exclusive open can prove a device idle.
func UsesOf(device uint64) (filesystems, nodes []MountPoint, err error) {
	table, err := os.ReadFile(mountTable)
	if err != nil {
		return nil, nil, err
	}
	number := fmt.Appendf(nil, "%d:%d", unix.Major(device), unix.Minor(device))
	root := "/" + kernelName(device)
	var lines []byte // those that may be about the device: most are not worth parsing
	for line := range bytes.Lines(table) {
		if mayUse(line, number, root) {
			lines = append(lines, line...)
		}
	}
	mounts, err := parseMounts(lines)
	if err != nil {
		return nil, nil, err
	}
	return newTable(mounts).UsesOf(device)
}

// mayUse reports whether a line of mountTable can be about a device that has that
// number, and in the kernel's own /dev that path.
func mayUse(line, number []byte, root string) bool {
	fields := bytes.SplitN(line, []byte(" "), 5) // ID, parent's ID, device, root, and the rest
	if len(fields) < 5 || bytes.Equal(fields[2], number) {
		return true // the parser tells of a line that is none
	}
	_, kind, _ := bytes.Cut(fields[4], []byte(" - "))
	kind, _, _ = bytes.Cut(kind, []byte(" "))
	switch string(kind) {
	case "devtmpfs": // the node of another loop device, which in use are most, is surely that
		return string(fields[3]) == root || !bytes.HasPrefix(fields[3], []byte("/loop"))
	case "tmpfs":
		return string(fields[3]) != "/"
	}
	return string(kind) == string(Btrfs)
}

// Table is the mounts of this process's mount namespace at one moment, for who
// asks for the uses of many devices.
type Table struct {
	mounts []MountPoint
	nodes  []DeviceNode
}

// DeviceNode is a bind mount of a single device node, or of what is now one.
type DeviceNode struct {
	MountPoint
	Number uint64 // dev_t; 0 if there is no device behind the node
}

// ReadTable reads the mounts.
func ReadTable() (*Table, error) {
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	return newTable(mounts), nil
}

func newTable(mounts []MountPoint) *Table {
	t := &Table{mounts: mounts}
	for _, m := range mounts {
		if (m.Type == "devtmpfs" || m.Type == "tmpfs") && m.Root != "/" {
			number, _ := deviceNumber(m.Path)
			t.nodes = append(t.nodes, DeviceNode{m, number})
		}
	}
	return t
}

// DeviceNodes lists the bind mounts of device nodes in /dev.
func (t *Table) DeviceNodes() []DeviceNode { return t.nodes }

// UsesOf is the function of that name, of the moment of the table.
func (t *Table) UsesOf(device uint64) (filesystems, nodes []MountPoint, err error) {
	name := kernelName(device)
	siblings, err := btrfsSiblings(name)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range t.mounts {
		switch {
		case m.Device == device:
			filesystems = append(filesystems, m)
		case m.Type == string(Btrfs) && slices.Contains(siblings, m.Device):
			filesystems = append(filesystems, m)
		case m.Type == string(Btrfs) && m.Device == 0 && len(siblings) > 0:
			return nil, nil, fmt.Errorf("cannot tell whether %s is mounted at %s: its source %s is not a block device here",
				name, m.Path, m.Source)
		}
	}
	for _, n := range t.nodes {
		// The name is right even where another mount covers this one; the
		// node behind it, where /dev is not the kernel's own.
		if n.Number == device || n.Type == "devtmpfs" && n.Root == "/"+name {
			nodes = append(nodes, n.MountPoint)
		}
	}
	return filesystems, nodes, nil
}

// btrfsSiblings lists the devices of the mounted btrfs that a device is part
// of, itself among them: any of them may stand as the source of a mount. It is
// empty if no btrfs that is mounted, in whatever namespace, uses the device.
// See btrfs(5), "/sys/fs/btrfs/UUID/devices".
func btrfsSiblings(name string) ([]uint64, error) {
	if name == "" {
		return nil, nil
	}
	memberships, err := filepath.Glob("/sys/fs/btrfs/*/devices/" + name)
	if err != nil {
		return nil, err
	}
	var siblings []uint64
	for _, membership := range memberships {
		devices := filepath.Dir(membership)
		entries, err := os.ReadDir(devices)
		if os.IsNotExist(err) {
			continue // unmounted meanwhile
		}
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			number, err := sysNumber(filepath.Join(devices, entry.Name(), "dev"))
			if err != nil {
				return nil, err
			}
			siblings = append(siblings, number)
		}
	}
	return siblings, nil
}

// deviceNumber is the number of the block device that path is a node of. It
// asks no disk and no server.
func deviceNumber(path string) (uint64, error) {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &stat)
	if err != nil {
		return 0, err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is not a block device", path)
	}
	return unix.Mkdev(stat.Rdev_major, stat.Rdev_minor), nil
}

// sysNumber reads a device number as sysfs writes it: "7:3".
func sysNumber(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s has %q: %w", path, text, err)
	}
	return unix.Mkdev(major, minor), nil
}

// sysDevice is the folder of a block device in sysfs.
func sysDevice(number uint64) string {
	return fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number))
}

// kernelName is what the kernel calls a block device; empty if there is none of
// that number.
func kernelName(number uint64) string {
	target, err := os.Readlink(sysDevice(number))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

func hasOption(options, option string) bool {
	return slices.Contains(strings.Split(options, ","), option)
}
