package harness

import (
	"crypto/rand"
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
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Pod is a pod as the block I/O controller of this machine's kernel sees it: a
// cgroup where the kubelet would make it, and one in it for each container. They
// are removed when the test ends, with what runs in them.
type Pod struct {
	UID     string
	Cgroup  string // its directory
	Unified bool   // of cgroup v2

	t testing.TB
}

// PodWithoutCgroup is a pod that has not begun.
func PodWithoutCgroup(t testing.TB) *Pod {
	t.Helper()
	return &Pod{UID: newUID(), t: t}
}

func newUID() string {
	h := fmt.Sprintf("%x", rand.Text())
	return fmt.Sprintf("%s-%s-4%s-8%s-%s", h[:8], h[8:12], h[12:15], h[15:18], h[18:30])
}

// NewPod makes a pod without containers. above is the cgroups that it is in,
// such as "kubepods/burstable", and name what it is called in them, with UID for
// its UID; empty are the usual ones.
func NewPod(t testing.TB, above, name string) *Pod {
	t.Helper()
	uid := newUID()
	p := &Pod{UID: uid, t: t}
	root, unified := ioHierarchy(t)
	p.Unified = unified
	if above == "" {
		above = "kubepods/burstable"
	}
	if name == "" {
		name = "podUID"
	}
	name = strings.NewReplacer("UID", uid, "U_I_D", strings.ReplaceAll(uid, "-", "_")).Replace(name)
	p.Cgroup = root
	for part := range strings.SplitSeq("orlop-test-"+uid[:8]+"/"+above+"/"+name, "/") {
		if unified {
			delegate(t, p.Cgroup)
		}
		p.Cgroup = filepath.Join(p.Cgroup, part)
		p.make(p.Cgroup)
	}
	return p
}

// ioHierarchy finds where the cgroups with the block I/O controller are.
func ioHierarchy(t testing.TB) (root string, unified bool) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), "blkio") {
			return m.Mountpoint, false
		}
	}
	for _, m := range mounts {
		controllers, err := os.ReadFile(filepath.Join(m.Mountpoint, "cgroup.controllers"))
		if err == nil && m.FSType == "cgroup2" && slices.Contains(strings.Fields(string(controllers)), "io") {
			return m.Mountpoint, true
		}
	}
	t.Fatal("no cgroup hierarchy with a block I/O controller is mounted")
	return "", false
}

// delegate turns the controller on for what is in a cgroup, until the test ends.
func delegate(t testing.TB, dir string) {
	t.Helper()
	file := filepath.Join(dir, "cgroup.subtree_control")
	on, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(strings.Fields(string(on)), "io") {
		return
	}
	if err := os.WriteFile(file, []byte("+io"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(file, []byte("-io"), 0) }) // others may use it by now
}

func (p *Pod) make(dir string) {
	p.t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		// What was killed leaves its cgroup in its own time.
		deadline := time.Now().Add(30 * time.Second)
		for {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				return
			}
			if time.Now().After(deadline) {
				p.t.Errorf("removing cgroup: %v", err)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

// Container makes a container's cgroup; a name with "/" is one in another.
func (p *Pod) Container(name string) string {
	p.t.Helper()
	dir := filepath.Join(p.Cgroup, name)
	p.make(dir)
	return dir
}

// SlowReads has a process read from a device once a second at most.
func (p *Pod) SlowReads(cgroup string, pid int, device uint64) {
	p.t.Helper()
	file, rule := "blkio.throttle.read_iops_device", fmt.Sprintf("%d:%d 1", unix.Major(device), unix.Minor(device))
	if p.Unified {
		delegate(p.t, p.Cgroup)
		file, rule = "io.max", fmt.Sprintf("%d:%d riops=1", unix.Major(device), unix.Minor(device))
	}
	if err := os.WriteFile(filepath.Join(cgroup, file), []byte(rule), 0); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		p.t.Fatal(err)
	}
}

// Target is where the kubelet would publish a volume for the pod.
func (p *Pod) Target(d *Driver, volume string, block bool) string {
	p.t.Helper()
	target := filepath.Join(d.Dir, "kubelet/pods", p.UID, "volumes/kubernetes.io~csi", volume, "mount")
	if block {
		target = filepath.Join(d.Dir, "kubelet/plugins/kubernetes.io/csi/volumeDevices/publish", volume, p.UID)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		p.t.Fatal(err)
	}
	return target
}

// Load is a process in a container that reads or writes a file or a device with
// direct I/O, as fast as it can.
type Load struct {
	t     testing.TB
	total *atomic.Int64 // operations
	stop  func()
}

// loadVariable tells a test's binary to be a [Load]: its counter's file, the
// file or device to use, the bytes of an operation, and what to do.
const loadVariable = "ORLOP_TEST_LOAD"

// span is what of its file a load uses, in bytes. The file must be as long.
const span = 16 << 20

// Load starts a load in a container's cgroup. It goes on until the test ends
// or it is stopped.
func (p *Pod) Load(cgroup, file string, operation int64, write bool) *Load {
	p.t.Helper()
	must := func(err error) {
		p.t.Helper()
		if err != nil {
			p.t.Fatal(err)
		}
	}
	counter := filepath.Join(p.t.TempDir(), "operations")
	must(os.WriteFile(counter, make([]byte, 8), 0o600))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s,%s,%d,%v", loadVariable, counter, file, operation, write))
	cmd.Stderr = os.Stderr
	begin, err := cmd.StdinPipe()
	must(err)
	must(cmd.Start())
	stop := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	p.t.Cleanup(stop)
	must(os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0))
	total, err := mapCounter(counter)
	must(err)
	must(begin.Close())
	return &Load{p.t, total, stop}
}

// mapCounter maps a file of eight bytes, which two processes then share.
func mapCounter(file string) (*atomic.Int64, error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	memory, err := unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*atomic.Int64)(unsafe.Pointer(&memory[0])), nil
}

// runLoad is what a [Load] does in its own process.
func runLoad(arguments string) error {
	words := strings.Split(arguments, ",")
	size, err := strconv.Atoi(words[2])
	if err != nil {
		return err
	}
	total, err := mapCounter(words[0])
	if err != nil {
		return err
	}
	if _, err := io.ReadAll(os.Stdin); err != nil { // until it is in its cgroup
		return err
	}
	f, err := os.OpenFile(words[1], os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err // its memory is aligned, as O_DIRECT wants it
	}
	do := f.ReadAt
	if words[3] == "true" {
		do = f.WriteAt
	}
	for at := int64(0); ; at = (at + int64(size)) % span {
		if _, err := do(buffer, at); err != nil {
			return err
		}
		total.Add(1)
	}
}

// Stop ends the load.
func (l *Load) Stop() { l.stop() }

// Rate measures the load over that time: operations a second.
func (l *Load) Rate(window time.Duration) float64 {
	before, begin := l.total.Load(), time.Now()
	time.Sleep(window)
	return float64(l.total.Load()-before) / time.Since(begin).Seconds()
}

// Settles fails the test unless the rate comes within a tenth of so many
// operations a second.
func (l *Load) Settles(rule string, rate float64) {
	l.t.Helper()
	l.becomes(fmt.Sprintf("%s: want %.1f", rule, rate), func(got float64) bool { return got > rate*0.9 && got < rate*1.1 })
}

// Exceeds fails the test unless the rate comes above so many operations a
// second.
func (l *Load) Exceeds(rule string, rate float64) {
	l.t.Helper()
	l.becomes(fmt.Sprintf("%s: want more than %.1f", rule, rate), func(got float64) bool { return got > rate })
}

func (l *Load) becomes(rule string, good func(float64) bool) {
	l.t.Helper()
	const window, patience = 3 * time.Second, 2 * time.Minute
	var seen []string
	for deadline := time.Now().Add(patience); ; {
		got := l.Rate(window)
		seen = append(seen, fmt.Sprintf("%.1f", got))
		if good(got) {
			l.t.Logf("%s operations a second: %s", rule, strings.Join(seen, ", "))
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s operations a second, got %s", rule, strings.Join(seen, ", "))
		}
	}
}
