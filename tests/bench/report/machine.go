package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is where the benchmarks ran.
type machine struct {
	Processor  string `json:"processor"`
	Processors int    `json:"processors"`
	MemoryGiB  int    `json:"memoryGiB"`
	Kernel     string `json:"kernel"`
	Filesystem string `json:"filesystem"` // below the pools' image files
	Load       string `json:"load"`       // average of a minute, before anything was measured
	Tools      string `json:"tools"`
	Go         string `json:"go"`
	Commit     string `json:"commit"`
	DriverSize int64  `json:"driverSize"` // bytes; 0 if there is none
	ImageSize  string `json:"imageSize"`  // of the container image; empty if there is none
}

func describe(driver string) machine {
	m := machine{Processors: runtime.NumCPU(), Go: runtime.Version(), Kernel: "Linux"}
	m.Processor = after("/proc/cpuinfo", "model name")
	var kb int
	_, _ = fmt.Sscanf(after("/proc/meminfo", "MemTotal"), "%d", &kb)
	m.MemoryGiB = (kb + 1<<19) >> 20
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(text), " ")
	}
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
	m.Commit = firstLine("git", "describe", "--tags", "--always", "--dirty")
	if info, err := os.Stat(driver); err == nil {
		m.DriverSize = info.Size()
		m.ImageSize = firstLine("buildah", "images", "--format", "{{.Size}}", "csi-driver:"+m.Commit)
	}
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
