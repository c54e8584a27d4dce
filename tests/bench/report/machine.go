package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where the benchmarks ran.
type machine struct {
	Processor  string `json:"processor"`
	Processors int    `json:"processors"`
	MemoryGiB  int    `json:"memoryGiB"`
	Kernel     string `json:"kernel"`
	Filesystem string `json:"filesystem"` // below the pools' image files
	Tools      string `json:"tools"`
	Go         string `json:"go"`
}

// session is when, where and of what benchmarks were run in one go.
type session struct {
	Machine    machine   `json:"machine"`
	Began      time.Time `json:"began"`
	Load       string    `json:"load"` // average of a minute, before anything was measured
	Commit     string    `json:"commit"`
	DriverSize int64     `json:"driverSize"` // bytes; 0 if there is none
	ImageSize  string    `json:"imageSize"`  // of the container image; empty if there is none
}

// sessionKey is what a line with a session, as JSON, begins with. Those who read
// benchmarks take it for a line of configuration.
const sessionKey = "session: "

// begin is a session that begins now; driver is the path of the driver as it is
// released.
func begin(driver string) session {
	s := session{Machine: describe(), Began: time.Now().UTC().Truncate(time.Second)}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		s.Load, _, _ = strings.Cut(string(text), " ")
	}
	s.Commit = firstLine("git", "describe", "--tags", "--always", "--dirty")
	if info, err := os.Stat(driver); err == nil {
		s.DriverSize = info.Size()
		s.ImageSize = firstLine("buildah", "images", "--format", "{{.Size}}", "csi-driver:"+s.Commit)
	}
	return s
}

func describe() machine {
	m := machine{Processors: runtime.NumCPU(), Go: runtime.Version(), Kernel: "Linux"}
	m.Processor = after("/proc/cpuinfo", "model name")
	var kb int
	_, _ = fmt.Sscanf(after("/proc/meminfo", "MemTotal"), "%d", &kb)
	m.MemoryGiB = (kb + 1<<19) >> 20
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = "Linux " + unix.ByteSliceToString(name.Release[:])
	}
	var fs unix.Statfs_t
	if unix.Statfs(os.TempDir(), &fs) == nil {
		m.Filesystem = map[int64]string{
			unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
		}[int64(fs.Type)]
	}
	m.Tools = strings.Join([]string{firstLine("mkfs.ext4", "-V"), firstLine("mkfs.xfs", "-V"), firstLine("fio", "--version")}, ", ")
	return m
}

// after gives what stands behind a key and a colon in a file of /proc.
func after(file, key string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// firstLine is the first line that a command writes, or nothing if it fails.
func firstLine(command string, arguments ...string) string {
	cmd := exec.Command(command, arguments...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if cmd.Run() != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.TrimSpace(out.String()), "\n")
	return line
}
