package e2e

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A pod as podYAML, on an emptyDir.
const emptyPodYAML = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
`

// isRunning is the condition that the containers of a pod run.
func isRunning(p *corev1.Pod) (bool, error) {
	return p != nil && p.Status.Phase == corev1.PodRunning, nil
}

// It tells how long a pod with a new volume takes to start, beside the same pod
// on an emptyDir, in turns.
func TestStartLatency(t *testing.T) {
	s := newSpace(t)
	const rounds = 11
	took := map[string][]time.Duration{}
	round := 0
	start := func(kind, text string, pairs ...string) {
		pod := fmt.Sprintf("%s-%d", kind, round)
		began := time.Now()
		s.apply(text, append(pairs, "pod", pod, "claim", pod)...)
		await(t, s.in(pods), pod, "running", isRunning)
		took[kind] = append(took[kind], time.Since(began))
		if kind != "emptydir" {
			want := s.sh(pod, fill("/data/file", 1))
			if got := s.sh(pod, sum("/data/file")); got != want {
				t.Errorf("the file of %s is %s, want %s", pod, got, want)
			}
		}
		s.delete(pods, pod) // the next has the machine for itself
	}
	for ; round <= rounds; round++ {
		node := nodes[round%len(nodes)]
		start("emptydir", emptyPodYAML+onNode, "node", node)
		start("ext4", join(claimYAML, podYAML+onNode), "node", node, "class", "orlop", "size", "1Gi")
		start("xfs", join(claimYAML, podYAML+onNode), "node", node, "class", "orlop-xfs", "size", "1Gi")
		start("block", join(blockClaimYAML, strings.Replace(blockPodYAML, "/dev/data", "/data/file", 1)+onNode), "node", node, "class", "orlop", "size", "1Gi")
		if round == 0 {
			clear(took) // the first is not like the rest
		}
	}
	base := median(took["emptydir"])
	for _, kind := range []string{"emptydir", "ext4", "xfs", "block"} {
		all := took[kind]
		t.Logf("from apply to Running, %s: median %.2f s (%+.2f s against emptydir), %.2f to %.2f s, %d times", kind,
			median(all).Seconds(), (median(all) - base).Seconds(), slices.Min(all).Seconds(), slices.Max(all).Seconds(), len(all))
	}
}

func median[T cmp.Ordered](all []T) T {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

// A hundred claims and pods at once all get what they asked for. The same pods
// on emptyDirs tell how much of the time is not the driver's.
func TestHundredAtOnce(t *testing.T) {
	const n = 100
	s := newSpace(t)
	measure := func(kind, text string, pairs ...string) {
		names := make([]string, n)
		began := time.Now()
		each(n, 20, func(i int) {
			names[i] = fmt.Sprintf("%s-%d", kind, i)
			s.apply(text, append([]string{"pod", names[i], "claim", names[i]}, pairs...)...)
		})
		took := make([]time.Duration, n)
		each(n, n, func(i int) {
			awaitFor(t, 4*patience, s.in(pods), names[i], "running", isRunning)
			took[i] = time.Since(began)
		})
		slices.Sort(took)
		on := map[string]int{}
		list, err := kube.CoreV1().Pods(s.name).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		for _, p := range list.Items {
			on[p.Spec.NodeName]++
		}
		t.Logf("%d pods at once, %s: all run after %.1f s, half of them after %.1f s; pods on nodes: %v", n, kind, took[n-1].Seconds(), took[n/2].Seconds(), on)
		if kind != "emptydir" {
			each(n, 4, func(i int) {
				want := s.sh(names[i], fill("/data/file", 1))
				if got := s.sh(names[i], sum("/data/file")); got != want {
					t.Errorf("the file of %s is %s, want %s", names[i], got, want)
				}
			})
			for _, node := range nodes {
				resident, peak := residentMemory(t, nodePod(t, node))
				t.Logf("%s with %d volumes: %.1f MiB resident, at most %.1f MiB", node, on[node], inMiB(resident), inMiB(peak))
			}
		}
		began = time.Now()
		each(n, 20, func(i int) { remove(t, s.in(pods), names[i]) })
		for _, name := range names {
			awaitFor(t, 4*patience, s.in(pods), name, "gone", func(p *corev1.Pod) (bool, error) { return p == nil, nil })
		}
		t.Logf("%d pods at once, %s: all are gone after %.1f s", n, kind, time.Since(began).Seconds())
	}
	measure("emptydir", emptyPodYAML)
	measure("ext4", join(claimYAML, podYAML), "class", "orlop", "size", "100Mi")
}

// each calls f with 0 to n-1, so many at a time. A call that ends the test (as
// t.Fatal does) ends only itself.
func each(n, atOnce int, f func(int)) {
	var all sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range n {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			f(i)
		})
	}
	all.Wait()
}

// residentMemory gives what the driver in a pod has resident, now and at most since it
// began, in bytes, as the kernel has it.
func residentMemory(t testing.TB, pod string) (resident, peak int64) {
	t.Helper()
	status, err := run(system, pod, container, "cat", "/proc/1/status")
	must(t, err)
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch {
		case err != nil:
		case key == "VmRSS":
			resident = kib << 10
		case key == "VmHWM":
			peak = kib << 10
		}
	}
	if resident == 0 || peak == 0 {
		t.Fatalf("/proc/1/status of %s does not tell: %s", pod, status)
	}
	return resident, peak
}

func inMiB(bytes int64) float64 { return float64(bytes) / float64(mib) }

// A node's driver stays below 40 MiB of memory with a hundred volumes in use on
// the node.
func TestMemoryOfNode(t *testing.T) {
	const each10, limit = 10, 40 * mib
	s := newSpace(t)
	node := nodes[0]
	restartPods(t, "node") // what came before shall not count
	pod := nodePod(t, node)
	idle, _ := residentMemory(t, pod)
	for p := range 10 {
		var mounts, list, all strings.Builder
		for v := range each10 {
			name := fmt.Sprintf("data-%d-%d", p, v)
			all.WriteString(strings.NewReplacer("${claim}", name, "${class}", "orlop", "${size}", "16Mi").Replace(claimYAML) + "\n---\n")
			fmt.Fprintf(&mounts, "    - {name: v%d, mountPath: /data/%d}\n", v, v)
			fmt.Fprintf(&list, "  - {name: v%d, persistentVolumeClaim: {claimName: %s}}\n", v, name)
		}
		s.apply(all.String()+`
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  terminationGracePeriodSeconds: 5
  nodeSelector: {kubernetes.io/hostname: ${node}}
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts:
`+mounts.String()+"  volumes:\n"+list.String(), "pod", fmt.Sprintf("app-%d", p), "node", node)
	}
	for p := range 10 {
		name := fmt.Sprintf("app-%d", p)
		s.runs(name)
		s.sh(name, "for i in 0 1 2 3 4 5 6 7 8 9; do echo "+name+" >/data/$i/name; sync /data/$i/name; done")
	}
	// The kubelet asks for the statistics of every volume once a minute; after
	// that, the driver has done all that it does.
	asked := func() float64 {
		page, err := metrics(pod, nodeMetrics)
		must(t, err)
		n, _ := sample(page, `csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="/csi.v1.Node/NodeGetVolumeStats"}`)
		return n
	}
	before := asked()
	eventually(t, "the kubelet asks for all statistics", func() error {
		if n := asked() - before; n < 100 {
			return fmt.Errorf("it asked %g times", n)
		}
		return nil
	})
	resident, peak := residentMemory(t, pod)
	t.Logf("the driver on %s: %.1f MiB resident when idle, %.1f MiB with 100 volumes in use, at most %.1f MiB", node, inMiB(idle), inMiB(resident), inMiB(peak))
	if resident >= limit {
		t.Errorf("the driver has %.1f MiB resident, and should stay below 40", inMiB(resident))
	}
	list, err := kube.CoreV1().PersistentVolumeClaims(s.name).List(context.Background(), metav1.ListOptions{})
	must(t, err)
	if len(list.Items) != 100 {
		t.Errorf("there are %d claims, want 100", len(list.Items))
	}
}
