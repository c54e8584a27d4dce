//go:build integration

package filesystem

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMountWithOptions(t *testing.T) {
	d := map[Type]device{}
	for _, fs := range []Type{Ext4, XFS, Btrfs} {
		d[fs] = made(t, fs, roomy)
	}
	for _, test := range []struct {
		fs      Type
		options []string
		mount   string // of mountinfo's options of the mount
		super   string // and of those of the filesystem
	}{
		{Ext4, nil, "rw,relatime", "rw"},
		{Ext4, []string{"defaults", "x-systemd.automount", "nofail,_netdev", "noauto", "comment=x"}, "rw,relatime", "rw"},
		{Ext4, []string{"noatime", "nosuid,nodev,noexec"}, "rw,nosuid,nodev,noexec,noatime", "rw"},
		{Ext4, []string{"strictatime,nodiratime,nosymfollow"}, "rw,nodiratime,nosymfollow", "rw"},
		{Ext4, []string{"noatime,relatime", "nosuid,suid"}, "rw,relatime", "rw"},
		{Ext4, []string{"user"}, "rw,nosuid,nodev,noexec,relatime", "rw"},
		{Ext4, []string{"sync,dirsync,lazytime"}, "rw,relatime", "rw,sync,dirsync,lazytime"},
		{Ext4, []string{"commit=17", "data=writeback", "discard"}, "rw,relatime", "rw,discard,commit=17,data=writeback"},
		{Ext4, []string{"ro"}, "ro,relatime", "ro"},
		{Ext4, []string{"ro", "rw"}, "rw,relatime", "rw"},
		{XFS, []string{"noatime,logbufs=4"}, "rw,noatime", "rw,nouuid,logbufs=4"},
		{XFS, []string{"ro"}, "ro,relatime", "ro,nouuid"},
		{Btrfs, []string{"nodiratime,compress=zstd:3,subvol=/"}, "rw,nodiratime,relatime", "rw,compress=zstd:3,subvol=/"},
	} {
		t.Run(string(test.fs)+" "+strings.Join(test.options, ";"), func(t *testing.T) {
			target := d[test.fs].mounted(t, test.fs, test.options...)
			mount, super := mountinfoOptions(t, target)
			if mount != test.mount {
				t.Errorf("the mount has %s, want %s", mount, test.mount)
			}
			for option := range strings.SplitSeq(test.super, ",") {
				if !hasOption(super, option) {
					t.Errorf("the filesystem has %s, want %s", super, option)
				}
			}
		})
	}
}

func mountinfoOptions(t *testing.T, target string) (mount, super string) {
	t.Helper()
	all, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(all)) {
		if f := strings.Fields(line); f[4] == target {
			mount, super = f[5], f[len(f)-1]
		}
	}
	return mount, super
}

func TestMountRefusesABadOptionInTheKernelsWords(t *testing.T) {
	for _, test := range []struct {
		fs     Type
		option string
		words  []string
	}{
		{Ext4, "foo", []string{"ext4: Unknown parameter 'foo'"}},
		{Ext4, "commit=often", []string{"commit=often"}},
		{Ext4, "bind", []string{"ext4: Unknown parameter 'bind'"}},
		{XFS, "foo=bar", []string{"xfs: Unknown parameter 'foo'"}},
		{Btrfs, "device=/dev/null", []string{"names a device"}},
		{Ext4, "source=/dev/null", []string{"names a device"}},
	} {
		t.Run(string(test.fs)+" "+test.option, func(t *testing.T) {
			d := made(t, test.fs, roomy)
			target := t.TempDir()
			unmountAfter(t, target)
			err := Mount(soon(t), d.path, target, test.fs, []string{"noatime", test.option}, false)
			wantError(t, err, ErrOption, test.words...)
			_, err = MountAt(target)
			wantError(t, err, ErrNotMounted)
		})
	}
}

// Before Linux 6.8, btrfs looks at its options only when it sees the
// superblock, and says what is wrong in the kernel log alone.
func TestMountTellsOfABadOptionOfBtrfs(t *testing.T) {
	d := made(t, Btrfs, roomy)
	target := t.TempDir()
	unmountAfter(t, target)
	wantError(t, Mount(soon(t), d.path, target, Btrfs, []string{"foo"}, false), nil, "'foo'")
	_, err := MountAt(target)
	wantError(t, err, ErrNotMounted)
}

func TestMountTellsWhyItFails(t *testing.T) {
	blank := newDevice(t, roomy)
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := t.TempDir()
		unmountAfter(t, target)
		mount := func(device, target string, readOnly bool) error {
			return Mount(soon(t), device, target, fs, nil, readOnly)
		}
		wantError(t, mount(blank.path, target, false), ErrNone, blank.path)
		wantError(t, mount("/dev/no-such-device", target, false), unix.ENOENT, "/dev/no-such-device")
		wantError(t, mount(d.path, target+"/none", false), unix.ENOENT, target+"/none")

		file := filepath.Join(t.TempDir(), "file")
		write(t, file, "")
		wantError(t, mount(d.path, file, false), nil, "directory")

		link := filepath.Join(t.TempDir(), "link")
		must(t, os.Symlink(target, link))
		wantError(t, mount(d.path, link, false), nil, "symbolic link")

		fd, err := unix.Open(d.path, unix.O_RDWR|unix.O_EXCL, 0)
		must(t, err)
		wantError(t, mount(d.path, target, false), ErrBusy, d.path)
		unix.Close(fd)

		readOnly := attachImage(t, d.image, unix.LO_FLAGS_READ_ONLY)
		wantError(t, mount(readOnly.path, target, false), unix.EACCES, "read-only")

		ended, cancel := context.WithCancel(context.Background())
		cancel()
		wantError(t, Mount(ended, d.path, target, fs, nil, false), context.Canceled)

		other := Ext4
		if fs == Ext4 {
			other = XFS
		}
		wantError(t, Mount(soon(t), d.path, target, other, nil, false), unix.EINVAL, "the device has "+string(fs))

		_, err = MountAt(target)
		wantError(t, err, ErrNotMounted)
	})
}

func TestMountTellsWhatTheKernelLogged(t *testing.T) {
	// As a host does whose kernel is older than the mkfs.
	d := made(t, Ext4, roomy)
	tool(t, "debugfs", "-w", "-R", "set_super_value feature_incompat 0x80000000", d.path)
	target := t.TempDir()
	wantError(t, Mount(soon(t), d.path, target, Ext4, nil, false), unix.EINVAL, "unsupported optional features (80000000)")

	d = made(t, XFS, roomy)
	tool(t, "xfs_db", "-x", "-c", "sb 0", "-c", "write -d features_incompat 0x4000000b", d.path)
	wantError(t, Mount(soon(t), d.path, target, XFS, nil, false), unix.EINVAL, "unknown incompatible features (0x40000000)")

	d = made(t, XFS, roomy)
	file, err := os.OpenFile(d.path, os.O_RDWR|unix.O_SYNC, 0)
	must(t, err)
	defer file.Close()
	_, err = file.WriteAt([]byte{1}, 120)
	must(t, err)
	wantError(t, Mount(soon(t), d.path, target, XFS, nil, false), ErrDamaged, "CRC error")
}

func TestMountReadOnly(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		live := d.mounted(t, fs)
		write(t, filepath.Join(live, "file"), "in the log")
		crashed := d.copy(t)
		must(t, Unmount(soon(t), live))

		for name, d := range map[string]device{
			"with a log to replay":  crashed,
			"on a read-only device": attachImage(t, d.image, unix.LO_FLAGS_READ_ONLY),
		} {
			target := t.TempDir()
			// The request wins over the option.
			must(t, Mount(soon(t), d.path, target, fs, []string{"rw"}, true))
			unmountAfter(t, target)
			wantFile(t, filepath.Join(target, "file"), "in the log")
			if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("%s: write: %v", name, err)
			}
			if m, err := MountAt(target); err != nil || !m.ReadOnly || !m.SuperReadOnly {
				t.Errorf("%s: %+v, %v", name, m, err)
			}
			must(t, Unmount(soon(t), target))
		}
	})
}

// A copy has the identity of its source, unless it gets its own.
func TestMountOfACopyBesideItsSource(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		source := d.mounted(t, fs)
		write(t, filepath.Join(source, "file"), "of both")
		thaw, err := Freeze(soon(t), source)
		must(t, err)
		copied := d.copy(t)
		must(t, thaw())

		must(t, RenewUUID(soon(t), copied.path, fs))
		target := copied.mounted(t, fs)
		wantFile(t, filepath.Join(target, "file"), "of both")
		write(t, filepath.Join(source, "file"), "of the source")
		write(t, filepath.Join(target, "file"), "of the copy")

		must(t, Unmount(soon(t), source))
		must(t, Unmount(soon(t), target))
		d.wantSound(t, fs)
		copied.wantSound(t, fs)
		// In the other order, too.
		must(t, Mount(soon(t), copied.path, target, fs, nil, false))
		must(t, Mount(soon(t), d.path, source, fs, nil, false))
		wantFile(t, filepath.Join(source, "file"), "of the source")
		wantFile(t, filepath.Join(target, "file"), "of the copy")
	})
}

func TestBind(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		source := d.mounted(t, fs)
		write(t, filepath.Join(source, "file"), "same")

		writable, readOnly := t.TempDir(), t.TempDir()
		must(t, Bind(source, writable, false))
		unmountAfter(t, writable)
		must(t, Bind(source, readOnly, true))
		unmountAfter(t, readOnly)

		write(t, filepath.Join(writable, "new"), "new")
		wantFile(t, filepath.Join(readOnly, "new"), "new")
		for _, attempt := range []error{
			os.WriteFile(filepath.Join(readOnly, "other"), nil, 0o600),
			os.WriteFile(filepath.Join(readOnly, "file"), nil, 0o600),
			os.Remove(filepath.Join(readOnly, "file")),
			os.Chmod(filepath.Join(readOnly, "file"), 0o777),
		} {
			if !errors.Is(attempt, unix.EROFS) {
				t.Errorf("through a read-only bind: %v", attempt)
			}
		}
		if m, err := MountAt(readOnly); err != nil || !m.ReadOnly || m.SuperReadOnly {
			t.Errorf("%+v, %v", m, err)
		}
	})
}

func TestBindOfADeviceNode(t *testing.T) {
	d := newDevice(t, mib)
	target := filepath.Join(t.TempDir(), "node")
	write(t, target, "")
	must(t, Bind(d.path, target, true))
	unmountAfter(t, target)

	if number, err := deviceNumber(target); err != nil || number != d.number {
		t.Errorf("the node at the target is %x, want %x (%v)", number, d.number, err)
	}
	// What Bind says of block devices: the kernel lets them be written.
	node, err := os.OpenFile(target, os.O_WRONLY|unix.O_SYNC, 0)
	must(t, err)
	defer node.Close()
	if _, err := node.WriteString("written"); err != nil {
		t.Errorf("write through a read-only bind of a node: %v", err)
	}
}

func TestBindRefuses(t *testing.T) {
	d := newDevice(t, mib)
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	write(t, file, "")
	must(t, os.Symlink(dir, link))
	wantError(t, Bind(dir, link, false), nil, link, "symbolic link")
	wantError(t, Bind(d.path, dir, false), nil, "directory")
	wantError(t, Bind(dir, file, false), nil, "directory")
	wantError(t, Bind(dir, filepath.Join(dir, "none"), false), unix.ENOENT)
	wantError(t, Bind(filepath.Join(dir, "none"), dir, false), unix.ENOENT)
}

func TestUnmount(t *testing.T) {
	d := made(t, Ext4, roomy)
	target := d.mounted(t, Ext4)

	t.Run("refuses what is in use", func(t *testing.T) {
		file, err := os.Create(filepath.Join(target, "open"))
		must(t, err)
		wantError(t, Unmount(soon(t), target), ErrBusy, target)
		must(t, file.Close())
	})
	t.Run("uncovers what is beneath", func(t *testing.T) {
		must(t, Bind(t.TempDir(), target, false))
		must(t, Unmount(soon(t), target))
		if m, err := MountAt(target); err != nil || m.Device != d.number {
			t.Errorf("%+v, %v", m, err)
		}
	})
	t.Run("does not follow a symbolic link", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		must(t, os.Symlink(target, link))
		must(t, Unmount(soon(t), link))
		_, err := MountAt(target)
		must(t, err)
	})
	t.Run("can be repeated", func(t *testing.T) {
		for range 3 {
			must(t, Unmount(soon(t), target))
		}
		must(t, Unmount(soon(t), filepath.Join(target, "none")))
	})
}

func TestMountAt(t *testing.T) {
	// As /var/lib/kubelet is on some nodes.
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	target := filepath.Join(link, "with blank\tand tab")
	must(t, os.Mkdir(target, 0o700))
	_, err := MountAt(target)
	wantError(t, err, ErrNotMounted, target)
	_, err = MountAt(filepath.Join(target, "none"))
	wantError(t, err, ErrNotMounted)

	below, above := made(t, Ext4, roomy), made(t, XFS, roomy)
	must(t, Mount(soon(t), below.path, target, Ext4, nil, true))
	unmountAfter(t, target)
	must(t, Mount(soon(t), above.path, target, XFS, nil, false))
	m, err := MountAt(target)
	must(t, err)
	want := MountPoint{
		ID: m.ID, Path: filepath.Join(dir, "with blank\tand tab"), Root: "/", Type: "xfs", Source: above.path, Device: above.number,
	}
	if m != want {
		t.Errorf("the topmost is %+v, want %+v", m, want)
	}
	_, err = MountAt(link)
	wantError(t, err, ErrNotMounted)
}

func TestUsesOf(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d, other := made(t, fs, roomy), made(t, fs, roomy)
		other.mounted(t, fs)
		wantUses(t, d)

		staged := d.mounted(t, fs)
		must(t, os.Mkdir(filepath.Join(staged, "folder"), 0o700))
		bound, folder, covered := t.TempDir(), t.TempDir(), t.TempDir()
		must(t, Bind(staged, bound, true))
		unmountAfter(t, bound)
		must(t, Bind(filepath.Join(staged, "folder"), folder, false))
		unmountAfter(t, folder)
		must(t, Bind(staged, covered, false))
		unmountAfter(t, covered)
		must(t, Bind(t.TempDir(), covered, false))
		wantUses(t, d, staged, bound, folder, covered)

		node, coveredNode := filepath.Join(t.TempDir(), "node"), filepath.Join(t.TempDir(), "node")
		for _, target := range []string{node, coveredNode} {
			write(t, target, "")
			must(t, Bind(d.path, target, false))
			unmountAfter(t, target)
		}
		must(t, Bind(other.path, coveredNode, false))
		wantUses(t, d, staged, bound, folder, covered, "node "+node, "node "+coveredNode)

		for _, target := range []string{staged, bound, folder} {
			must(t, Unmount(soon(t), target))
		}
		wantUses(t, d, covered, "node "+node, "node "+coveredNode)
	})
}

// A btrfs tells no device number, only the path that it was mounted by.
func TestUsesOfABtrfsMountedByAnotherName(t *testing.T) {
	d := made(t, Btrfs, roomy)
	name := filepath.Join(t.TempDir(), "name")
	must(t, unix.Mknod(name, unix.S_IFBLK|0o600, int(d.number)))
	target := t.TempDir()
	must(t, Mount(soon(t), name, target, Btrfs, nil, false))
	unmountAfter(t, target)
	wantUses(t, d, target)

	must(t, os.Remove(name))
	_, _, err := UsesOf(d.number)
	wantError(t, err, nil, "cannot tell", target, name)
	// Nobody else is troubled.
	wantUses(t, made(t, Btrfs, roomy))
}

func TestUsesOfABtrfsOfTwoDevices(t *testing.T) {
	first, second := newDevice(t, roomy), newDevice(t, roomy)
	tool(t, "mkfs.btrfs", "-q", "-f", first.path, second.path)
	tool(t, "btrfs", "device", "scan", first.path, second.path)
	target := second.mounted(t, Btrfs)
	wantUses(t, first, target)
	wantUses(t, second, target)
}

// In a container, /dev is often a tmpfs.
func TestUsesOfANodeThatIsNotTheKernels(t *testing.T) {
	d := newDevice(t, mib)
	dev := t.TempDir()
	must(t, unix.Mount("dev", dev, "tmpfs", 0, ""))
	unmountAfter(t, dev)
	node := filepath.Join(dev, "disk")
	must(t, unix.Mknod(node, unix.S_IFBLK|0o600, int(d.number)))
	target := filepath.Join(t.TempDir(), "target")
	write(t, target, "")
	must(t, Bind(node, target, false))
	unmountAfter(t, target)
	wantUses(t, d, "node "+target)
}

func wantUses(t *testing.T, d device, want ...string) {
	t.Helper()
	filesystems, nodes, err := UsesOf(d.number)
	must(t, err)
	var got []string
	for _, m := range filesystems {
		got = append(got, m.Path)
	}
	for _, m := range nodes {
		got = append(got, "node "+m.Path)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("uses of %s: %q, want %q", d.path, got, want)
	}
}

// Who holds a device for a moment, to look at it, is waited for.
func TestADeviceThatIsHeldForAMomentIsWaitedFor(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		hold := func() (letGo chan error) {
			fd, err := unix.Open(d.path, unix.O_RDWR|unix.O_EXCL, 0)
			must(t, err)
			letGo = make(chan error, 1)
			time.AfterFunc(100*time.Millisecond, func() { letGo <- unix.Close(fd) })
			return letGo
		}
		letGo := hold()
		must(t, RenewUUID(soon(t), d.path, fs))
		must(t, <-letGo)
		letGo = hold()
		d.mounted(t, fs)
		must(t, <-letGo)
	})
}

// A child that begins to run a program has open for a moment what this process
// has, and keeps a device claimed and a mount busy.
func TestACopyIsMountedWhateverElseIsRun(t *testing.T) {
	d := made(t, Btrfs, roomy)
	target := t.TempDir()
	unmountAfter(t, target)
	stop := make(chan struct{})
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command("true").Run()
				}
			}
		})
	}
	defer running.Wait()
	defer close(stop)
	for range 100 {
		must(t, RenewUUID(soon(t), d.path, Btrfs))
		must(t, Mount(soon(t), d.path, target, Btrfs, nil, false))
		must(t, Patiently(soon(t), func() error { return Unmount(soon(t), target) }))
	}
}
