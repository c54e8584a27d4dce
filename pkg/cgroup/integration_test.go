//go:build integration

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// device makes a loop device.
func device(t *testing.T) loop.Device {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(16<<20))
	d, err := loop.Attach(f, loop.Options{})
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := d.Detach(ctx); err != nil {
			t.Error(err)
		}
	})
	return d
}

func limiter(t *testing.T) *Limiter {
	t.Helper()
	l := NewLimiter(func(err error) { t.Error(err) })
	t.Cleanup(func() { must(t, l.Close()) })
	return l
}

// read tells the limits in one cgroup, as the kernel has them.
func read(t *testing.T, pod *harness.Pod, dir string, device uint64) Limits {
	t.Helper()
	if pod.Unified {
		l, err := readUnified(filepath.Join(dir, "io.max"), device)
		must(t, err)
		return l
	}
	var values [4]int64
	for i, file := range throttle {
		limits, err := readThrottle(filepath.Join(dir, file.file))
		must(t, err)
		values[i] = limits[number(device)]
	}
	return Limits{values[0], values[1], values[2], values[3]}
}

// holds waits until the limits hold for all containers of a pod.
func holds(t *testing.T, pod *harness.Pod, device uint64, want Limits, containers ...string) {
	t.Helper()
	if pod.Unified {
		containers = nil // they have the pod's
	}
	deadline := time.Now().Add(30 * time.Second)
	for _, dir := range append([]string{pod.Cgroup}, containers...) {
		for {
			got := read(t, pod, dir, device)
			if got == want {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s has %+v, want %+v", dir, got, want)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func TestLimitsAreSetChangedAndLiftedForAllContainers(t *testing.T) {
	l, pod := limiter(t), harness.NewPod(t, "", "")
	one, other := device(t), device(t)
	containers := []string{pod.Container("a"), pod.Container("b"), pod.Container("b/inner")}
	must(t, l.Limit(pod.UID, other.Number, Limits{ReadIOPS: 5}))
	for _, want := range []Limits{
		{3, 2, 4096, 8192},
		{3, 2, 4096, 8192},
		{0, 2, 1 << 40, 0},
		{1_000_000_000, 0, 0, 1 << 20},
		{},
		{WriteBandwidth: 1 << 20},
		{},
	} {
		must(t, l.Limit(pod.UID, one.Number, want))
		holds(t, pod, one.Number, want, containers...)
		holds(t, pod, other.Number, Limits{ReadIOPS: 5}, containers...)
	}
}

func TestContainersThatBeginLaterHaveTheLimitsToo(t *testing.T) {
	l, d := limiter(t), device(t)
	for _, layout := range []struct{ above, name string }{
		{"", ""},
		{"kubepods", "podUID"},
		{"node-1/kubepods/besteffort", "podUID"},
		{"kubepods.slice/kubepods-burstable.slice", "kubepods-burstable-podU_I_D.slice"},
	} {
		pod := harness.NewPod(t, layout.above, layout.name)
		want := Limits{ReadIOPS: 10, WriteBandwidth: 1 << 20}
		must(t, l.Limit(pod.UID, d.Number, want))
		containers := []string{pod.Container("later"), pod.Container("later/inner"), pod.Container("later/inner/most")}
		holds(t, pod, d.Number, want, containers...)
		want = Limits{WriteIOPS: 7}
		must(t, l.Limit(pod.UID, d.Number, want))
		holds(t, pod, d.Number, want, containers...)
		must(t, l.Limit(pod.UID, d.Number, Limits{}))
		holds(t, pod, d.Number, Limits{}, append(containers, pod.Container("last"))...)
	}
}

// Containers begin and end while limits are changed. In the end all that are
// there have the last ones.
func TestContainersBeginWhileLimitsChange(t *testing.T) {
	const rounds = 60
	l, d, pod := limiter(t), device(t), harness.NewPod(t, "", "")
	must(t, l.Limit(pod.UID, d.Number, Limits{ReadIOPS: 2}))
	var containers []string
	var work sync.WaitGroup
	work.Go(func() {
		for i := range rounds {
			passing := filepath.Join(pod.Cgroup, fmt.Sprintf("passing-%d", i%3))
			if err := os.Mkdir(passing, 0o755); err != nil {
				t.Error(err)
			}
			if i%5 == 0 {
				containers = append(containers, pod.Container(fmt.Sprintf("stays-%d", i)))
			}
			if err := os.Remove(passing); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range int64(rounds) {
		must(t, l.Limit(pod.UID, d.Number, Limits{ReadIOPS: 2 + i%7, WriteBandwidth: 4096 * (i % 5)}))
	}
	last := Limits{ReadIOPS: 2, WriteIOPS: 99}
	must(t, l.Limit(pod.UID, d.Number, last))
	work.Wait()
	holds(t, pod, d.Number, last, containers...)
}

// What a limiter was about to do for new containers as it is closed is no error.
func TestALimiterIsClosedWhileContainersBegin(t *testing.T) {
	d, pod := device(t), harness.NewPod(t, "", "")
	for i := range 50 {
		l := NewLimiter(func(err error) { t.Error(err) })
		must(t, l.Limit(pod.UID, d.Number, Limits{ReadIOPS: 2}))
		for j := range 4 {
			pod.Container(fmt.Sprintf("%d-%d", i, j))
		}
		must(t, l.Close())
	}
}

// The kernel keeps a watch of a cgroup that is gone until it is told not to.
func TestTheWatchesOfAPodEndWithIt(t *testing.T) {
	l, d := limiter(t), device(t)
	t.Run("pod", func(t *testing.T) {
		pod := harness.NewPod(t, "", "")
		pod.Container("a")
		must(t, l.Limit(pod.UID, d.Number, Limits{ReadIOPS: 2}))
		holds(t, pod, d.Number, Limits{ReadIOPS: 2}, pod.Container("b"), pod.Container("b/inner"))
	})
	if l.watcher == nil {
		return // cgroup v2 needs none
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		l.watcher.mu.Lock()
		left := len(l.watcher.dirs)
		l.watcher.mu.Unlock()
		if left <= 1 { // of the cgroup that it was in, which the kubelet keeps
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d watches are left", left)
		}
	}
}

func TestWhatCannotBeLimitedIsToldApart(t *testing.T) {
	l, d, pod := limiter(t), device(t), harness.NewPod(t, "", "")
	for _, uid := range []string{"00000000-0000-4000-8000-000000000000", pod.UID[:len(pod.UID)-1], "../" + pod.UID, "*"} {
		if err := l.Limit(uid, d.Number, Limits{ReadIOPS: 2}); !errors.Is(err, ErrNoPod) {
			t.Errorf("pod %q: %v, want ErrNoPod", uid, err)
		}
	}
	if err := l.Limit(pod.UID, unix.Mkdev(240, 1<<10), Limits{ReadIOPS: 2}); err == nil || errors.Is(err, ErrNoPod) || errors.Is(err, ErrUnsupported) {
		t.Errorf("a device that is not there: %v", err)
	}
}

// The processes of a pod do what its limit says, also when it was so low that
// one of their operations has to wait for seconds when it is raised.
func TestTheRateFollowsTheLimit(t *testing.T) {
	l, d, pod := limiter(t), device(t), harness.NewPod(t, "", "")
	set := func(limits Limits) { must(t, l.Limit(pod.UID, d.Number, limits)) }
	set(Limits{WriteBandwidth: 512 << 10})
	load := pod.Load(pod.Container("a"), d.Path, 64<<10, true)
	load.Settles("512 KiB", 8)
	set(Limits{WriteBandwidth: 4 << 10}) // sixteen seconds for one of them
	load.Rate(3 * time.Second)
	set(Limits{WriteBandwidth: 1 << 20})
	load.Settles("1 MiB", 16)
	set(Limits{WriteIOPS: 2})
	load.Rate(3 * time.Second)
	set(Limits{WriteIOPS: 30})
	load.Settles("30 operations", 30)
	set(Limits{WriteIOPS: 10, WriteBandwidth: 2 << 20})
	load.Settles("10 operations", 10)
	set(Limits{})
	load.Exceeds("no limit", 40)
}
