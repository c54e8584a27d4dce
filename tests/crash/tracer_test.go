//go:build integration

package crash

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// point is where in an operation a process is killed: as it is about to make
// its n-th change, n from 1, which then does not happen. 0 is nowhere.
type point struct {
	n      int
	answer bool         // instead: after the n-th change, as it is about to write to a socket
	within bool         // instead: while the kernel makes the n-th change, be it done or not
	fail   func() error // the power fails with it, if there is a function that has it fail
	errno  unix.Errno   // instead, if it is not 0: the change is not made and fails with it, and nothing is killed
}

// tracer follows all threads of a process with ptrace(2), counts the changes
// that they make together, and kills the process at a point.
//
// strace can inject a signal, too, but counts for each thread apart, and in a
// Go program the same work meets other threads every time.
type tracer struct {
	at     point
	family bool   // the programs that the process has started die with it
	dir    string // writes to files below it are changes
	pid    int

	// All changes that were begun, in order, and how many of them before the
	// last write to a socket; to be read after end.
	changes  []string
	answered int

	due    bool  // the process is killed once the thread that stopped goes on
	failed error // of a power that would not fail, or a call that would not
	lying  int   // the thread whose call gets a result that is not the kernel's
	lied   bool

	killed atomic.Bool
	stop   atomic.Bool
	done   chan struct{}
}

// attach begins to trace a running process. From when it returns, every change
// counts.
func attach(pid int, dir string, at point, family bool) (*tracer, error) {
	tr := &tracer{at: at, family: family, dir: dir, pid: pid, done: make(chan struct{})}
	return tr, tr.begin(func() (map[int]bool, error) { return seize(pid) })
}

// launch starts a process that is traced from its first instruction.
func launch(cmd *exec.Cmd, dir string, at point, family bool) (*tracer, error) {
	tr := &tracer{at: at, family: family, dir: dir, done: make(chan struct{})}
	return tr, tr.begin(func() (map[int]bool, error) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		tr.pid = cmd.Process.Pid
		var status unix.WaitStatus
		if _, err := unix.Wait4(tr.pid, &status, 0, nil); err != nil { // stops at its execve(2)
			return nil, err
		}
		// What is traced in that way begins new threads with a SIGSTOP, which
		// would stop the whole process if the tracing ended just then. So it
		// is let go of, standing still, and seized.
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(tr.pid), 0, uintptr(unix.SIGSTOP), 0, 0)
		if errno != 0 {
			return nil, errno
		}
		stopping, err := seize(tr.pid)
		if err != nil {
			return nil, err
		}
		return stopping, unix.Kill(tr.pid, unix.SIGCONT)
	})
}

// end waits until the process that was killed is gone, or lets go of one that
// was not. The operation must have ended.
func (tr *tracer) end() {
	tr.stop.Store(true)
	for {
		_ = unix.Kill(tr.pid, unix.SIGURG) // wakes follow; a Go program ignores it
		select {
		case <-tr.done:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

const traceOptions = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE

// begin starts the thread that traces: all requests of ptrace(2) must come from
// one. attach gives the threads that have yet to stop for the first time.
func (tr *tracer) begin(attach func() (map[int]bool, error)) error {
	ready := make(chan error, 1)
	var trace func()
	trace = func() {
		// The thread ends with the goroutine, and with it the tracing.
		runtime.LockOSThread()
		// What this thread has started, another tracer may follow: to wait here
		// would take its stops from it. When the thread ends they become
		// children of the main one.
		if children, err := os.ReadFile("/proc/thread-self/children"); err != nil || len(children) > 0 {
			if err != nil {
				ready <- err
				close(tr.done)
				return
			}
			go trace()
			return
		}
		defer close(tr.done)
		pending, err := attach()
		if err != nil {
			ready <- err
			return
		}
		tr.follow(pending, ready)
	}
	go trace()
	return <-ready
}

// seize attaches to all threads of a process, makes them stop, and gives those.
func seize(pid int) (map[int]bool, error) {
	seen, stopping := map[int]bool{}, map[int]bool{}
	for found := true; found; {
		found = false
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			tid, err := strconv.Atoi(entry.Name())
			if err != nil || seen[tid] {
				continue
			}
			found, seen[tid] = true, true
			stops, err := seizeThread(tid)
			if err != nil {
				return nil, err
			}
			if stops {
				stopping[tid] = true
			}
		}
	}
	return stopping, nil
}

// seizeThread attaches to a thread and makes it stop, unless it has ended or
// was born traced.
func seizeThread(tid int) (stops bool, err error) {
	for range 200 {
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, traceOptions, 0, 0)
		switch {
		case errno == 0:
			err := unix.PtraceInterrupt(tid)
			return err == nil, ignore(err, unix.ESRCH)
		case errno == unix.ESRCH || errno == unix.EPERM && tracerOf(tid) == unix.Gettid():
			return false, nil
		case errno != unix.EPERM:
			return false, errno
		}
		time.Sleep(5 * time.Millisecond) // an earlier tracer's thread is still ending
	}
	return false, fmt.Errorf("thread %d is traced by %d", tid, tracerOf(tid))
}

func ignore(err, harmless error) error {
	if errors.Is(err, harmless) {
		return nil
	}
	return err
}

// tracerOf is the thread that traces a thread: proc_pid_status(5).
func tracerOf(tid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(status), "TracerPid:")
	line, _, _ := strings.Cut(rest, "\n")
	tracer, _ := strconv.Atoi(strings.TrimSpace(line))
	return tracer
}

// follow handles every stop of every thread. pending are those that must have
// stopped once before the tracer is ready.
func (tr *tracer) follow(pending map[int]bool, ready chan<- error) {
	told := false
	for {
		if !told && len(pending) == 0 {
			ready <- nil
			told = true
		}
		var status unix.WaitStatus
		// Only what this thread traces: the test's own processes are not ours
		// to wait for.
		tid, err := unix.Wait4(-1, &status, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil: // ECHILD: all are gone
			if !told {
				ready <- err
			}
			return
		}
		delete(pending, tid)
		if tr.stop.Load() && !tr.killed.Load() {
			return
		}
		if !status.Stopped() {
			continue
		}
		signal := 0
		switch event := int(status) >> 16; {
		case event != 0: // PTRACE_EVENT_CLONE, PTRACE_EVENT_STOP
		case status.StopSignal() == unix.SIGTRAP|0x80:
			tr.syscall(tid)
		default:
			signal = int(status.StopSignal())
		}
		_ = unix.PtraceSyscall(tid, signal) // ESRCH: it was killed
		if tr.due {
			tr.due = false
			tr.kill()
		}
	}
}

// syscallInfo is struct ptrace_syscall_info, ptrace(2), at the entry of a call.
type syscallInfo struct {
	op     uint8
	_      [3]uint8
	arch   uint32
	ip, sp uint64
	nr     uint64
	args   [6]uint64
	_      [32]byte
}

// syscall handles a thread that stopped at a system call.
func (tr *tracer) syscall(tid int) {
	const getSyscallInfo, entry = 0x420e, 1 // PTRACE_GET_SYSCALL_INFO, PTRACE_SYSCALL_INFO_ENTRY
	var info syscallInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if tid == tr.lying {
		tr.lying = 0
		tr.failed = lie(tid, tr.at.errno)
		return
	}
	if errno != 0 || info.op != entry || tr.killed.Load() {
		return
	}
	what, fd := tr.describe(&info)
	switch {
	case what != "":
		tr.changes = append(tr.changes, what)
		switch {
		case tr.at.answer || len(tr.changes) != tr.at.n:
		case tr.at.errno != 0:
			if tr.failed = skipCall(tid); tr.failed == nil {
				tr.lying, tr.lied = tid, true
			}
		case tr.at.within:
			tr.due = true
		default:
			tr.kill()
		}
	case strings.HasPrefix(fd, "socket:"):
		tr.answered = len(tr.changes)
		if tr.at.answer && tr.answered >= tr.at.n {
			tr.kill()
		}
	}
}

// kill kills the process. A thread that is stopped as it enters a system call
// does not make it any more.
func (tr *tracer) kill() {
	tr.killed.Store(true)
	if tr.at.fail != nil { // before, so that nothing can be made of a process that ends
		tr.failed = tr.at.fail()
	}
	victims := []int{tr.pid}
	if tr.family {
		victims = append(victims, children(tr.pid)...)
	}
	for _, pid := range victims {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// children lists the processes that a process has started.
func children(parent int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var pids []int
	for _, stat := range stats {
		text, err := os.ReadFile(stat)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(parent) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(stat))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ioctls are those that change something, by the kernel's names.
var ioctls = map[uint64]string{
	0x40049409:               "FICLONE",
	0xc0045877:               "FIFREEZE",
	0xc0045878:               "FITHAW",
	0x401c5820:               "FS_IOC_FSSETXATTR",
	0x4010586e:               "XFS_IOC_FSGROWFSDATA",
	0x40086610:               "EXT4_IOC_RESIZE_FS",
	0x50009403:               "BTRFS_IOC_RESIZE",
	unix.LOOP_CTL_GET_FREE:   "LOOP_CTL_GET_FREE",
	unix.LOOP_CTL_REMOVE:     "LOOP_CTL_REMOVE",
	unix.LOOP_CONFIGURE:      "LOOP_CONFIGURE",
	unix.LOOP_CLR_FD:         "LOOP_CLR_FD",
	unix.LOOP_SET_STATUS64:   "LOOP_SET_STATUS64",
	unix.LOOP_SET_CAPACITY:   "LOOP_SET_CAPACITY",
	unix.LOOP_SET_DIRECT_IO:  "LOOP_SET_DIRECT_IO",
	unix.LOOP_SET_BLOCK_SIZE: "LOOP_SET_BLOCK_SIZE",
}

// describe says in words what change a system call is about to make, if it
// makes one that a crash could leave half-done: to a directory, a file, a
// device, or the mounts, or by starting a program. It also says what a write
// goes to.
func (tr *tracer) describe(info *syscallInfo) (what, fd string) {
	a := info.args
	var name string
	switch info.nr {
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return fmt.Sprintf("rename %s to %s", tr.text(a[1]), tr.text(a[3])), ""
	case unix.SYS_MKDIRAT:
		return "mkdir " + tr.text(a[1]), ""
	case unix.SYS_UNLINKAT:
		return "unlink " + tr.text(a[1]), ""
	case unix.SYS_OPENAT:
		if a[2]&unix.O_CREAT != 0 {
			return "create " + tr.text(a[1]), ""
		}
		return "", ""
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNCFS:
		name = "sync"
	case unix.SYS_FTRUNCATE:
		name = "ftruncate"
	case unix.SYS_FALLOCATE:
		name = "fallocate"
	case unix.SYS_COPY_FILE_RANGE:
		return "copy to " + strings.TrimPrefix(tr.file(a[2]), tr.dir+"/"), ""
	case unix.SYS_WRITE, unix.SYS_PWRITE64:
		fd := tr.file(a[0])
		for _, dir := range []string{tr.dir + "/", "/sys/", "/dev/loop"} {
			if strings.HasPrefix(fd, dir) {
				return "write " + strings.TrimPrefix(fd, tr.dir+"/"), ""
			}
		}
		return "", fd
	case unix.SYS_IOCTL:
		if name = ioctls[a[1]]; name == "" {
			return "", ""
		}
	case unix.SYS_FSOPEN:
		return "fsopen " + tr.text(a[0]), ""
	case unix.SYS_FSCONFIG:
		if a[1] == unix.FSCONFIG_CMD_CREATE { // this mounts
			return "fsconfig create", ""
		}
		return "", ""
	case unix.SYS_FSMOUNT:
		return "fsmount", ""
	case unix.SYS_OPEN_TREE:
		return "open_tree " + tr.text(a[1]), ""
	case unix.SYS_MOUNT_SETATTR:
		return "mount_setattr", ""
	case unix.SYS_MOVE_MOUNT:
		return "move_mount", ""
	case unix.SYS_UMOUNT2:
		return "umount " + tr.text(a[0]), ""
	case unix.SYS_CLONE:
		if a[0]&unix.CLONE_THREAD == 0 {
			return "start a program", ""
		}
		return "", ""
	case unix.SYS_CLONE3: // struct clone_args begins with the flags
		if flags := tr.memory(a[0], 8); len(flags) == 8 && *(*uint64)(unsafe.Pointer(&flags[0]))&unix.CLONE_THREAD == 0 {
			return "start a program", ""
		}
		return "", ""
	case unix.SYS_WAITID: // while it runs
		return "wait for a program", ""
	default:
		return "", ""
	}
	return name + " " + strings.TrimPrefix(tr.file(a[0]), tr.dir+"/"), ""
}

// file says what a descriptor of the process is.
func (tr *tracer) file(fd uint64) string {
	name, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tr.pid, int32(fd)))
	if err != nil {
		return "?"
	}
	return name
}

// text reads a string of the process.
func (tr *tracer) text(address uint64) string {
	name, _, _ := strings.Cut(string(tr.memory(address, 256)), "\x00")
	return name
}

// memory reads at most n bytes of the process, fewer at the end of a mapping.
func (tr *tracer) memory(address uint64, n int) []byte {
	buf := make([]byte, n)
	page := uint64(os.Getpagesize())
	n = min(n, int(page-address%page)) // the next page may not be there
	local := []unix.Iovec{{Base: &buf[0], Len: uint64(n)}}
	remote := []unix.RemoteIovec{{Base: uintptr(address), Len: n}}
	read, err := unix.ProcessVMReadv(tr.pid, local, remote, 0)
	if err != nil {
		return nil
	}
	return buf[:read]
}
