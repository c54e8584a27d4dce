package cluster

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// clusterName is the cluster's: of its directory, its cgroups, and its link on this machine.
// A second cluster at the same time needs another, ORLOP_E2E_NAME.
var clusterName = chosenName()

func chosenName() string {
	name := cmp.Or(os.Getenv("ORLOP_E2E_NAME"), "orlop-e2e")
	if !regexp.MustCompile(`^[a-z][-a-z0-9]{0,14}$`).MatchString(name) { // as long as the name of a link may be
		panic(fmt.Sprintf("ORLOP_E2E_NAME=%q: up to 15 of a-z, 0-9 and - are needed", name))
	}
	return name
}

// Dir is where the cluster keeps everything.
var Dir = filepath.Join("/var/tmp", clusterName)

// A machine is a set of namespaces (mount, PID, network, UTS, IPC) that look like
// a machine of their own: the control plane, or a node. It lives as long as its
// first process, and nothing of it, no process, mount or link, outlives that.
//
// Which process that is, is always asked of the kernel: no file can be out of date.
type machine struct {
	name string
}

// dir has the machine's files: its /var/lib and /var/log, configuration and logs.
func (m machine) dir() string { return filepath.Join(Dir, m.name) }

// pid is the machine's first process, or 0 if it is not running.
func (m machine) pid() (int, error) {
	pids, err := processes(func(pid int) bool {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		want := fmt.Sprintf("%s\x00%s\x00%s\x00", program("node"), m.name, m.dir())
		return err == nil && string(args) == want
	})
	if err != nil || len(pids) == 0 {
		return 0, err
	}
	if len(pids) > 1 {
		return 0, fmt.Errorf("%s runs more than once: processes %v", m.name, pids)
	}
	return pids[0], nil
}

// processes gives those processes of this PID namespace that are alive and match.
func processes(match func(pid int) bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err == nil && match(pid) && alive(pid) {
			found = append(found, pid)
		}
	}
	return found, nil
}

// alive tells whether a process exists and is not a zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := bytes.Cut(stat, []byte(") ")) // the name before may hold anything
	return len(after) > 0 && after[0] != 'Z' && after[0] != 'X'
}

// boot starts the machine: its namespaces, with nothing in them yet.
func (m machine) boot(ctx context.Context) error {
	pid, err := m.pid()
	if err != nil || pid != 0 {
		return errors.Join(err, fmt.Errorf("%s is running already", m.name))
	}
	if err := os.MkdirAll(m.logs(), 0o755); err != nil {
		return err
	}
	cmd := exec.Command(program("node"), m.name, m.dir())
	cmd.Dir = "/"
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		// By unshare, because package syscall then makes all mounts private first.
		Unshareflags: syscall.CLONE_NEWNS,
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", m.name, err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	go cmd.Wait() //nolint:errcheck // it ends when the node is killed
	if strings.TrimSpace(line) != "ready" {
		return errors.Join(fmt.Errorf("set up %s: %s", m.name, line), err)
	}
	if err := m.run(ctx, "ip", "link", "set", "lo", "up"); err != nil {
		return err
	}
	// Without IPv6 no address waits for duplicate address detection. Connections to
	// the dead are given up at the first try, as network.go says.
	return m.run(ctx, "sh", "-c", `
		echo 1 >/proc/sys/net/ipv4/ip_forward
		echo 1 >/proc/sys/net/ipv4/tcp_orphan_retries
		for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do [ ! -e $f ] || echo 1 >$f; done`)
}

// halt kills everything in the machine at once, as when the power fails, and
// waits until it is gone.
func (m machine) halt(ctx context.Context) error {
	pid, err := m.pid()
	if err != nil || pid == 0 {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill %s: %w", m.name, err)
	}
	// The first process is gone only when all others are.
	return poll(ctx, time.Minute, m.name+" to end", func(context.Context) error {
		if alive(pid) {
			return fmt.Errorf("process %d is still there", pid)
		}
		return nil
	})
}

// command gives a command that runs in the machine's namespaces.
func (m machine) command(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	pid, err := m.pid()
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, fmt.Errorf("%s is not running", m.name)
	}
	enter := []string{"--target", strconv.Itoa(pid), "--mount", "--net", "--pid", "--uts", "--ipc", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Dir = "/"
	cmd.Env = environment()
	return cmd, nil
}

// output runs a command in the machine and gives its standard output.
func (m machine) output(ctx context.Context, name string, args ...string) (string, error) {
	cmd, err := m.command(ctx, name, args...)
	if err != nil {
		return "", err
	}
	return output(cmd)
}

func (m machine) run(ctx context.Context, name string, args ...string) error {
	_, err := m.output(ctx, name, args...)
	return err
}

func (m machine) logs() string { return filepath.Join(m.dir(), "logs") }

// start starts a daemon in the machine. It is to run until it is killed.
func (m machine) start(name string, args ...string) error {
	cmd, err := m.command(context.Background(), program(name), args...)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(m.logs(), name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, m.name, err)
	}
	go cmd.Wait() //nolint:errcheck // a daemon that fails is found by those that wait for it
	return nil
}

// daemons gives the processes of a daemon that start started.
func (m machine) daemons(name string) ([]int, error) {
	pid, err := m.pid()
	if err != nil || pid == 0 {
		return nil, err
	}
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return nil, fmt.Errorf("look into %s: %w", m.name, err)
	}
	return processes(func(pid int) bool {
		other, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		if err != nil || other != namespace {
			return false
		}
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err == nil && bytes.HasPrefix(args, []byte(program(name)+"\x00"))
	})
}

// stop ends a daemon: at once, or after what it does when it is asked to.
func (m machine) stop(ctx context.Context, name string, signal syscall.Signal) error {
	pids, err := m.daemons(name)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop %s on %s: %w", name, m.name, err)
		}
	}
	return poll(ctx, time.Minute, name+" on "+m.name+" to end", func(context.Context) error {
		pids, err := m.daemons(name)
		if err == nil && len(pids) > 0 {
			err = fmt.Errorf("processes %v are still there", pids)
		}
		return err
	})
}

// file is where a file of the machine is for this process.
func (m machine) file(path string) (string, error) {
	pid, err := m.pid()
	if err == nil && pid == 0 {
		err = fmt.Errorf("%s is not running", m.name)
	}
	return fmt.Sprintf("/proc/%d/root%s", pid, path), err
}

// program is where a binary of the cluster is.
func program(name string) string { return filepath.Join(Dir, "bin", name) }

func environment() []string {
	return []string{
		"HOME=/root",
		"PATH=" + filepath.Join(Dir, "bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
}

// poll tries until it succeeds. What it waited for is in the error when it does
// not within the time.
func poll(ctx context.Context, limit time.Duration, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil { // the error of a try that was cut off says nothing
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", limit, what, last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
