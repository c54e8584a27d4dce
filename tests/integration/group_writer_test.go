//go:build integration

package integration

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// groupRecordSize is the size in bytes of what a counter writes at a time.
const groupRecordSize = 4096

// groupCounterVariable tells a test's binary to be a counter: the file that it
// shares, and those that it writes to.
const groupCounterVariable = "ORLOP_TEST_COUNTER"

// groupCounter is a process that writes 1, 2, 3 and so on, each to the next of
// some files and devices, and brings each to stable storage before it begins the
// next. So what the files hold at one instant is known from the largest of them.
type groupCounter struct {
	safe    *atomic.Int64 // the last that the kernel has said is on stable storage
	longest *atomic.Int64 // the most that one took, in nanoseconds; the test may reset it
	files   []string
}

// groupCount starts a counter on files or devices, in the cgroup if that is not
// empty. It ends with the test.
func groupCount(t *testing.T, cgroup string, files ...string) *groupCounter {
	t.Helper()
	shared := filepath.Join(t.TempDir(), "counter")
	dataMust(t, os.WriteFile(shared, make([]byte, 16), 0o600))
	for _, file := range files { // all of it is there before it is overwritten
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o600)
		dataMust(t, err)
		_, err = f.Write(make([]byte, groupRecordSize))
		dataMust(t, errors.Join(err, f.Sync(), f.Close()))
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), groupCounterVariable+"="+strings.Join(append([]string{shared}, files...), ","))
	cmd.Stderr = os.Stderr
	begin, err := cmd.StdinPipe()
	dataMust(t, err)
	dataMust(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if cgroup != "" {
		dataMust(t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0))
	}
	c := &groupCounter{files: files}
	c.safe, c.longest, err = groupShare(shared)
	dataMust(t, err)
	dataMust(t, begin.Close())
	c.progress(t, int64(len(files)))
	return c
}

// groupShare maps the two numbers that a counter shares with its test.
func groupShare(file string) (safe, longest *atomic.Int64, err error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	memory, err := unix.Mmap(int(f.Fd()), 0, 16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	return (*atomic.Int64)(unsafe.Pointer(&memory[0])), (*atomic.Int64)(unsafe.Pointer(&memory[8])), nil
}

// groupRunCounter is what a counter does in its own process.
func groupRunCounter(arguments string) error {
	words := strings.Split(arguments, ",")
	safe, longest, err := groupShare(words[0])
	if err != nil {
		return err
	}
	if _, err := io.ReadAll(os.Stdin); err != nil { // until it is in its cgroup
		return err
	}
	var files []*os.File
	for _, name := range words[1:] {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	record := make([]byte, groupRecordSize)
	for n := int64(1); ; n++ {
		binary.LittleEndian.PutUint64(record, uint64(n))
		f, began := files[n%int64(len(files))], time.Now()
		if _, err := f.WriteAt(record, 0); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		safe.Store(n)
		longest.Store(max(longest.Load(), int64(time.Since(began))))
	}
}

// progress waits until the counter has come further by n.
func (c *groupCounter) progress(t *testing.T, n int64) {
	t.Helper()
	goal := c.safe.Load() + n
	dataEventually(t, func() error {
		if got := c.safe.Load(); got < goal {
			return fmt.Errorf("the counter hangs at %d", got)
		}
		return nil
	})
}

// groupPlace is where in its device the counter's record is: it is overwritten
// where it is.
func groupPlace(t *testing.T, file string) int64 {
	t.Helper()
	f, err := os.Open(file)
	dataMust(t, err)
	defer f.Close()
	info, err := f.Stat()
	dataMust(t, err)
	if !info.Mode().IsRegular() {
		return 0
	}
	const fibmap, figetbsz = 1, 2 // FIBMAP, FIGETBSZ of linux/fs.h
	size := [2]int32{}            // an int each
	block := [2]int32{}
	for request, at := range map[uintptr]*[2]int32{fibmap: &block, figetbsz: &size} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(at))); errno != 0 {
			t.Fatalf("where is %s: %v", file, errno)
		}
	}
	if block[0] == 0 {
		t.Fatalf("%s has no block", file)
	}
	return int64(block[0]) * int64(size[0])
}

// groupViolation compares what the counter's files hold, as they were at one
// instant: if they hold n, they hold all that was written before n. It gives what
// is wrong, or nothing.
func groupViolation(values []int64) string {
	last, k := slices.Max(values), int64(len(values))
	for i, got := range values {
		due := last - (last-int64(i)+k)%k // the last of those up to last that belongs to i
		if due > 0 && got < due {
			return fmt.Sprintf("%d is there, but volume %d has %d instead of %d: %v", last, i, got, due, values)
		}
	}
	return ""
}

// groupPod makes the cgroup of a pod with one container, where processes can be
// stopped in the way that this machine has, and gives the pod's UID and the
// container's directory. Both are removed at the test's end.
func groupPod(t *testing.T) (uid, container string) {
	t.Helper()
	random := fmt.Sprintf("%x", rand.Text())
	uid = fmt.Sprintf("%.8s-%.4s-4%.3s-8%.3s-%.12s", random, random[8:], random[12:], random[15:], random[18:])
	dir := "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); errors.Is(err, fs.ErrNotExist) {
		dir = "/sys/fs/cgroup"
	}
	for _, part := range []string{"orlop-test-" + random[:8], "pod" + uid, "container"} {
		dir = filepath.Join(dir, part)
		made := dir
		dataMust(t, os.Mkdir(made, 0o755))
		t.Cleanup(func() {
			deadline := time.Now().Add(30 * time.Second)
			for err := os.Remove(made); err != nil; err = os.Remove(made) { // what was killed leaves in its own time
				if time.Now().After(deadline) {
					t.Errorf("removing a cgroup: %v", err)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	return uid, dir
}

// groupFrozen tells whether a pod is stopped, by the container's directory.
func groupFrozen(t *testing.T, container string) bool {
	t.Helper()
	for file, thawed := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
		text, err := os.ReadFile(filepath.Join(filepath.Dir(container), file))
		if err == nil {
			return strings.TrimSpace(string(text)) != thawed
		}
	}
	t.Fatal("the pod has no freezer")
	return false
}
