// Command node is the first process of a node, and of a pod: it reaps what the
// others leave behind.
//
//	node [NAME DIRECTORY]
//
// With a name it is started in new mount, PID, network, UTS and IPC namespaces,
// and makes them look like a machine of its own before it says so on its standard
// output. All that runs in the namespaces, and all mounts, end with this process.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	if len(os.Args) == 3 {
		if err := become(os.Args[1], os.Args[2]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("ready")
		os.Stdout.Close()
		os.Stderr.Close()
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	for s := range signals {
		if s != syscall.SIGCHLD {
			os.Exit(0)
		}
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if pid <= 0 && !errors.Is(err, syscall.EINTR) {
				break
			}
		}
	}
}

// letGo unmounts what is mounted of loop devices: it is somebody else's on the
// machine, and a copy of such a mount would keep the device in use after its
// owner has unmounted it.
func letGo() error {
	const path, separator = 4, "-" // of the fields of a line; see proc_pid_mountinfo(5)
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, line := range slices.Backward(strings.Split(strings.TrimSpace(string(table)), "\n")) {
		fields := strings.Fields(line)
		i := slices.Index(fields, separator)
		if i < 0 || i+2 >= len(fields) || !strings.HasPrefix(fields[i+2], "/dev/loop") || fields[path] == "/" {
			continue
		}
		at, err := strconv.Unquote(`"` + strings.ReplaceAll(fields[path], `"`, `\"`) + `"`) // octal escapes
		if err != nil {
			return fmt.Errorf("mount table: %w in %q", err, line)
		}
		if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			return fmt.Errorf("unmount %s: %w", at, err)
		}
	}
	return nil
}

// become sets up the namespaces. What a node changes of the machine's files goes
// to the directory.
func become(name, directory string) error {
	if err := syscall.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	if err := letGo(); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC); err != nil {
		return err
	}
	if err := mount("tmpfs", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV); err != nil {
		return err
	}
	for _, dir := range []string{"/var/lib", "/var/log"} {
		source := filepath.Join(directory, dir)
		if err := os.MkdirAll(source, 0o755); err != nil {
			return err
		}
		if err := mount(source, dir, "", syscall.MS_BIND); err != nil {
			return err
		}
	}
	// The kubelet sets these, and they are the whole machine's: it gets files.
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		source := filepath.Join(directory, "sysctl", name)
		if err := os.MkdirAll(filepath.Dir(source), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(source, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := mount(source, "/proc/sys/"+name, "", syscall.MS_BIND); err != nil {
			return err
		}
	}
	// As on a machine that systemd started: mounts reach the containers that ask
	// for it. Not the machine's own namespace: this one was made private before.
	return mount("", "/", "", syscall.MS_SHARED|syscall.MS_REC)
}

func mount(source, target, fstype string, flags uintptr) error {
	if err := syscall.Mount(source, target, fstype, flags, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}
