package filesystem

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kernelLog reads what the kernel logs about one device. A filesystem writes
// there, and to nobody else, why it refuses a superblock.
type kernelLog struct {
	fd   int // negative if the log cannot be read, as in an unprivileged container
	name string
}

// followKernelLog begins to read what the kernel logs about the device of that
// number.
func followKernelLog(number uint64) kernelLog {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return kernelLog{fd: -1}
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		unix.Close(fd)
		return kernelLog{fd: -1}
	}
	return kernelLog{fd: fd, name: kernelName(number)}
}

// stop returns what was logged since followKernelLog: a few lines, in brackets,
// behind a blank.
func (l kernelLog) stop() string {
	if l.fd < 0 {
		return ""
	}
	defer unix.Close(l.fd)
	const atMost = 8
	var said []string
	record := make([]byte, 8192)
	for len(said) < atMost {
		n, err := unix.Read(l.fd, record)
		if errors.Is(err, unix.EPIPE) {
			continue // overtaken by newer records
		}
		if err != nil {
			break
		}
		if text, ok := warningAbout(l.name, string(record[:n])); ok {
			said = append(said, text)
		}
	}
	if len(said) == 0 {
		return ""
	}
	return " [" + strings.Join(said, "; ") + "]"
}

// warningAbout returns the text of a record of /dev/kmsg (kernel documentation,
// ABI/testing/dev-kmsg: "3,1234,5678,-;EXT4-fs (loop3): …", and lines of keys
// after it) if it is a warning or worse about the device. ext4 and XFS write
// "(loop3)", btrfs "(device loop3)".
func warningAbout(name, record string) (string, bool) {
	const warning, priorityBits = 4, 7 // LOG_WARNING, LOG_PRIMASK: syslog(3)
	prefix, text, _ := strings.Cut(record, ";")
	number, _, _ := strings.Cut(prefix, ",")
	level, err := strconv.Atoi(number)
	if err != nil || level&priorityBits > warning {
		return "", false
	}
	text, _, _ = strings.Cut(text, "\n")
	return text, strings.Contains(text, "("+name+")") || strings.Contains(text, " "+name+")")
}
