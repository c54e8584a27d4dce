package filesystem

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// parameter is one thing to tell a filesystem that is being mounted.
type parameter struct {
	key, value string
	isFlag     bool // a key without a value
}

func (p parameter) String() string {
	if p.isFlag {
		return p.key
	}
	return p.key + "=" + p.value
}

// What the options of mount(8) do that concern one mount, not the filesystem.
// user, users, owner and group are only for fstab, but imply others.
var mountAttributes = map[string]struct{ clear, set int }{
	"suid":        {clear: unix.MOUNT_ATTR_NOSUID},
	"nosuid":      {set: unix.MOUNT_ATTR_NOSUID},
	"dev":         {clear: unix.MOUNT_ATTR_NODEV},
	"nodev":       {set: unix.MOUNT_ATTR_NODEV},
	"exec":        {clear: unix.MOUNT_ATTR_NOEXEC},
	"noexec":      {set: unix.MOUNT_ATTR_NOEXEC},
	"symfollow":   {clear: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"nosymfollow": {set: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"diratime":    {clear: unix.MOUNT_ATTR_NODIRATIME},
	"nodiratime":  {set: unix.MOUNT_ATTR_NODIRATIME},

	"atime":         {clear: unix.MOUNT_ATTR__ATIME},
	"relatime":      {clear: unix.MOUNT_ATTR__ATIME, set: unix.MOUNT_ATTR_RELATIME},
	"norelatime":    {clear: unix.MOUNT_ATTR__ATIME},
	"noatime":       {clear: unix.MOUNT_ATTR__ATIME, set: unix.MOUNT_ATTR_NOATIME},
	"strictatime":   {clear: unix.MOUNT_ATTR__ATIME, set: unix.MOUNT_ATTR_STRICTATIME},
	"nostrictatime": {clear: unix.MOUNT_ATTR__ATIME},

	"user":  {set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
	"users": {set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
	"owner": {set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV},
	"group": {set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV},
}

// Options of mount(8) and fstab(5) that mean nothing to the kernel.
var userspaceOptions = []string{
	"defaults", "auto", "noauto", "nofail", "_netdev", "nouser", "nousers", "noowner", "nogroup", "comment",
}

// Options that lead the kernel to another device than the one to be mounted.
var forbiddenParameters = []string{"source", "device", "journal_dev", "journal_path", "logdev", "rtdev"}

// parseMountOptions sorts options as mount(8) takes them with -o into the
// attributes of the mount (MOUNT_ATTR_*) and the parameters of the filesystem,
// which the kernel judges. Of those that contradict each other the last wins.
func parseMountOptions(options []string) (attributes int, parameters []parameter, err error) {
	for _, list := range options {
		for _, option := range splitOptions(list) {
			key, value, hasValue := strings.Cut(option, "=")
			attribute, isAttribute := mountAttributes[option]
			switch {
			case option == "" || strings.HasPrefix(key, "x-") || slices.Contains(userspaceOptions, key):
			case strings.ContainsRune(option, 0):
				return 0, nil, fmt.Errorf("%w: %q has a NUL", ErrOption, option)
			case slices.Contains(forbiddenParameters, key):
				return 0, nil, fmt.Errorf("%w: %q names a device, which is not accepted", ErrOption, option)
			case isAttribute:
				attributes = attributes&^attribute.clear | attribute.set
			default:
				// Of these the kernel handles ro, rw, sync, async, dirsync
				// and lazytime before the filesystem sees them.
				parameters = append(parameters, parameter{key, unquote(value), !hasValue})
			}
			switch option {
			case "ro": // as with mount(8): the filesystem and this mount of it
				attributes |= unix.MOUNT_ATTR_RDONLY
			case "rw":
				attributes &^= unix.MOUNT_ATTR_RDONLY
			}
		}
	}
	return attributes, parameters, nil
}

// splitOptions splits at commas outside double quotes, which are there for
// SELinux contexts such as context="system_u:object_r:container_file_t:s0:c1,c2".
func splitOptions(list string) []string {
	quoted := false
	return strings.FieldsFunc(list, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return r == ',' && !quoted
	})
}

func unquote(value string) string {
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		return value[1 : len(value)-1]
	}
	return value
}
