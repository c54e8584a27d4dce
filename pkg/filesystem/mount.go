package filesystem

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount mounts the filesystem on a device at a directory that exists, and that
// is not a symbolic link. Options are as for mount(8) -o, in one string or in
// several; those for userspace (defaults, nofail, x-…) mean nothing here. XFS
// always gets nouuid, because a copy has the UUID of its source.
//
// A read-only mount does not write files, but replays the log if there is one,
// for which the device must be writable.
//
// An option that the kernel refuses is ErrOption, unless it does so only when
// it sees the superblock (some combinations of options; all of them with btrfs
// before Linux 6.8). A device that something else holds for more than a second, or
// an ext4 or XFS that is mounted writable where read-only is wanted or the other
// way round, is ErrBusy; what the kernel finds corrupt is ErrDamaged; a device
// without any of the three filesystems is ErrNone. The error has the kernel's own
// words, also those that it writes only to its log.
//
// When ctx ends, nothing gets mounted any more.
func Mount(ctx context.Context, device, target string, t Type, options []string, readOnly bool) error {
	mount, err := MountDetached(ctx, device, t, options, readOnly)
	if err != nil {
		return err
	}
	defer mount.Close()
	return mount.Attach(target)
}

// Detached is a mount that is nowhere yet (fsmount(2)).
type Detached struct {
	fd   int
	what string
}

// MountDetached is [Mount] without the last step: nobody sees the filesystem
// until it is attached, and a process that dies before has not mounted it.
func MountDetached(ctx context.Context, device string, t Type, options []string, readOnly bool) (*Detached, error) {
	what := fmt.Sprintf("mount %s of %s", t, device)
	attributes, parameters, err := parseMountOptions(options)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if t == XFS {
		parameters = append(parameters, parameter{key: "nouuid", isFlag: true})
	}
	if readOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
		parameters = append(parameters, parameter{key: "ro", isFlag: true})
	}
	var fd int
	err = Patiently(ctx, func() (err error) {
		fd, err = within(ctx, what, func() (int, error) {
			return fsmount(device, t, parameters, attributes)
		}, func(fd int) { unix.Close(fd) })
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Detached{fd, what}, nil
}

// Attach has the filesystem appear at a directory, as [Mount] describes it.
func (d *Detached) Attach(target string) error {
	if err := attach(d.fd, target); err != nil {
		return fmt.Errorf("%s at %s: %w", d.what, target, err)
	}
	return nil
}

// Close unmounts the filesystem, unless it was attached.
func (d *Detached) Close() { unix.Close(d.fd) }

// fsmount makes a mount that goes away if its file descriptor is closed before
// it is attached: fsopen(2), fsconfig(2), fsmount(2).
func fsmount(device string, t Type, parameters []parameter, attributes int) (int, error) {
	fd, err := unix.Fsopen(string(t), unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return -1, fmt.Errorf("this kernel has no %s, built in or as a module: %w", t, err)
	}
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fd)

	if err := unix.FsconfigSetString(fd, "source", device); err != nil {
		return -1, fmt.Errorf("%w%s", err, messages(fd))
	}
	for _, p := range parameters {
		if p.isFlag {
			err = unix.FsconfigSetFlag(fd, p.key)
		} else {
			err = unix.FsconfigSetString(fd, p.key, p.value)
		}
		if err != nil {
			return -1, fmt.Errorf("%w %q: %w%s", ErrOption, p, err, messages(fd))
		}
	}
	number, _ := deviceNumber(device) // that it is none, the kernel says better
	log := followKernelLog(number)
	err = unix.FsconfigCreate(fd)
	said := log.stop()
	if err != nil {
		return -1, explain(fmt.Errorf("%w%s%s", err, messages(fd), said), device, t)
	}
	mount, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w%s", err, messages(fd))
	}
	return mount, nil
}

// explain adds what an error number means here.
func explain(err error, device string, t Type) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG): // EFSCORRUPTED and EFSBADCRC
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("the device is read-only: %w", err)
	case errors.Is(err, unix.EINVAL):
		if found, probeErr := Probe(device); probeErr != nil {
			return fmt.Errorf("%w: %w", err, probeErr)
		} else if found.Type != t {
			return fmt.Errorf("%w: the device has %s", err, found.Type)
		}
	}
	return err
}

// messages are the errors and warnings that the kernel has left in a filesystem
// context, one to a read(2), as "e ext4: Unknown parameter 'foo'".
func messages(fd int) string {
	var all []string
	line := make([]byte, 1024)
	for {
		n, err := unix.Read(fd, line)
		if err != nil || n < 2 {
			break
		}
		if line[0] != 'i' {
			all = append(all, strings.TrimSpace(string(line[2:n])))
		}
	}
	if len(all) == 0 {
		return ""
	}
	return ": " + strings.Join(all, "; ")
}

// Bind makes a directory, or a file such as a device node, appear at target
// too, which exists and is of the same kind and not a symbolic link. Mounts
// below source are not taken along. A read-only bind is so from its first
// moment on.
//
// Read-only does not protect a block device from being written through a bind
// of its node: the device itself must be read-only.
func Bind(source, target string, readOnly bool) error {
	if err := bind(source, target, readOnly); err != nil {
		return fmt.Errorf("bind %s at %s: %w", source, target, err)
	}
	return nil
}

func bind(source, target string, readOnly bool) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
	}
	return attach(tree, target)
}

// attach puts a detached mount at target. The target is opened first, so that
// it cannot become a symbolic link once it was looked at.
func attach(mount int, target string) error {
	at, err := unix.Open(target, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", target, err)
	}
	defer unix.Close(at)
	var there, here unix.Stat_t
	if err := errors.Join(unix.Fstat(at, &there), unix.Fstat(mount, &here)); err != nil {
		return fmt.Errorf("stat %s: %w", target, err)
	}
	if there.Mode&unix.S_IFMT == unix.S_IFLNK {
		return fmt.Errorf("%s is a symbolic link", target)
	}
	if there.Mode&unix.S_IFMT == unix.S_IFDIR != (here.Mode&unix.S_IFMT == unix.S_IFDIR) {
		return fmt.Errorf("only one of it and %s is a directory", target)
	}
	if err := unix.MoveMount(mount, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// Unmount unmounts what is topmost at target; what may be beneath is uncovered.
// Where nothing is mounted, or nothing is at all, it does nothing. A filesystem
// in use is ErrBusy, also if it is so for a moment only: see [Patiently]. When ctx
// ends before the kernel is done, the unmounting goes on.
//
// One that was left frozen is unmounted and yet keeps its device, until it is
// mounted again and thawed: [Thaw] it first.
func Unmount(ctx context.Context, target string) error {
	_, err := within(ctx, "unmount "+target, func() (struct{}, error) { return struct{}{}, unmount(target) }, nil)
	return err
}

func unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EINVAL):
		// Not a mount point, or one that this process may not unmount.
		if _, rootErr := mountID(target); errors.Is(rootErr, ErrNotMounted) {
			return nil
		}
	}
	return err
}
