package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// others gives the nodes but one.
func others(node string) []string {
	return slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == node })
}

// What was cut on one node is restored on every other, wherever the scheduler
// puts the pod; and so is a volume cloned that is in use.
func TestRestoreOnAnyNode(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML+onNode), "node", nodes[0], "claim", "data", "class", "orlop", "size", "640Mi", "pod", "app")
	s.runs("app")
	cut := s.sh("app", fill("/data/file", 256))
	s.apply(snapshotYAML, "snapshot", "cut", "claim", "data")
	s.cut("cut")
	now := s.sh("app", fill("/data/file", 256))
	for _, node := range others(nodes[0]) {
		s.apply(join(restoreYAML, podYAML+onNode), "node", node, "restored", "old-"+node, "class", "orlop", "size", "640Mi", "snapshot", "cut", "claim", "old-"+node, "pod", "old-"+node)
		s.apply(join(cloneYAML, podYAML+onNode), "node", node, "clone", "new-"+node, "class", "orlop", "size", "640Mi", "source", "data", "claim", "new-"+node, "pod", "new-"+node)
	}
	for _, node := range others(nodes[0]) {
		for name, want := range map[string]string{"old-" + node: cut, "new-" + node: now} {
			s.runs(name)
			if got := s.sh(name, sum("/data/file")); got != want {
				t.Errorf("%s has %s, want %s", name, got, want)
			}
		}
	}
}

// The driver is killed at both ends, and again, while a volume is copied. The
// copy is made, and no other volume with it.
func TestCopyThatIsCutOff(t *testing.T) {
	s := newSpace(t)
	from, to := nodes[0], nodes[1]
	s.apply(join(claimYAML, podYAML+onNode), "node", from, "claim", "data", "class", "orlop", "size", "4Gi", "pod", "app")
	s.runs("app")
	want := s.sh("app", fill("/data/file", 2048))
	s.apply(snapshotYAML, "snapshot", "cut", "claim", "data")
	s.cut("cut")
	before := count(t, "orlop_pool_volumes")
	s.apply(join(restoreYAML, podYAML+onNode), "node", to, "restored", "copy", "class", "orlop", "size", "4Gi", "snapshot", "cut", "claim", "copy", "pod", "reader")
	kills := 0
	for _, node := range []string{from, to, from, to} {
		made := false
		eventually(t, "the volume is on its way or made", func() error {
			page, err := metrics(nodePod(t, to), nodeMetrics)
			if err != nil {
				return err
			}
			n, err := sample(page, "orlop_copies_in_progress")
			if err != nil || n > 0 {
				return err
			}
			made = count(t, "orlop_pool_volumes") > before
			if !made {
				return errors.New("it is neither")
			}
			return nil
		})
		if made {
			break
		}
		killDriver(t, node)
		kills++
	}
	if kills < 2 {
		t.Errorf("the copy was cut off %d times only", kills)
	}
	s.runs("reader")
	t.Logf("the copy was cut off %d times", kills)
	if got := s.sh("reader", sum("/data/file")); got != want {
		t.Errorf("the copy has %s, want %s", got, want)
	}
	if got := count(t, "orlop_pool_volumes"); got != before+1 {
		t.Errorf("there are %d volumes, there were %d: want one more", got, before)
	}
}

// killDriver ends the driver on a node as a crash does, and waits for the next.
func killDriver(t *testing.T, node string) {
	t.Helper()
	pod := nodePod(t, node)
	restarts := func() (n int32) {
		p, err := kube.CoreV1().Pods(system).Get(t.Context(), pod, getNow)
		must(t, err)
		for _, c := range p.Status.ContainerStatuses {
			n += c.RestartCount
		}
		return n
	}
	n := restarts()
	p, err := kube.CoreV1().Pods(system).Get(t.Context(), pod, getNow)
	must(t, err)
	_, id, _ := strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "//")
	_, err = machineOf(t, node).Exec(t.Context(), "ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", id)
	must(t, err)
	await(t, resource(t, "pods", system), pod, "started again", func(p *corev1.Pod) (bool, error) {
		if p == nil {
			return false, errGone
		}
		ready, err := isReady(p)
		return ready && restarts() > n, err
	})
}

// A plain copy: all of a file over a connection between two pods, to stable
// storage at the other end.
const (
	receiveScript = `
import os, socket, sys
listener = socket.create_server(("0.0.0.0", 7000))
connection, _ = listener.accept()
out = os.open("/data/plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
buffer = bytearray(1 << 20)
while n := connection.recv_into(buffer):
    os.write(out, memoryview(buffer)[:n])
os.fsync(out)
connection.sendall(b"!")
`
	sendScript = `
import socket, sys, time
begin = time.monotonic()
connection = socket.create_connection((sys.argv[1], 7000))
with open("/data/file", "rb") as source:
    connection.sendfile(source)
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.monotonic() - begin)
`
)

// forget makes the machine read from its disks again: what a pod has just written
// is in memory, what a snapshot holds is not.
func forget(t *testing.T) {
	t.Helper()
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// It tells what a restore on another node costs beside a plain copy of the same
// bytes between the same nodes, in turns.
func TestCopySpeed(t *testing.T) {
	const mibs, rounds = 1024, 5
	s := newSpace(t)
	from, to := nodes[0], nodes[1]
	s.apply(join(claimYAML, podYAML+onNode), "node", from, "claim", "data", "class", "orlop", "size", "2Gi", "pod", "app")
	s.apply(join(claimYAML, podYAML+onNode), "node", to, "claim", "plain", "class", "orlop", "size", "2Gi", "pod", "receiver")
	s.runs("app")
	address := s.runs("receiver").Status.PodIP
	s.sh("app", fill("/data/file", mibs))
	s.apply(snapshotYAML, "snapshot", "cut", "claim", "data")
	s.cut("cut")
	var ratios []float64
	for i := range rounds {
		forget(t)
		s.sh("receiver", fmt.Sprintf("rm -f /data/plain; nohup python3 -c '%s' >/tmp/out 2>&1 & sleep 1", receiveScript))
		var plain float64
		_, err := fmt.Sscan(s.sh("app", fmt.Sprintf("python3 -c '%s' %s", sendScript, address)), &plain)
		must(t, err)

		forget(t)
		name := fmt.Sprintf("copy-%d", i)
		begin := time.Now()
		s.apply(join(restoreYAML, podYAML+onNode), "node", to, "restored", name, "class", "orlop", "size", "2Gi", "snapshot", "cut", "claim", name, "pod", name)
		s.bound(name)
		whole := time.Since(begin).Seconds()
		copied := copyTime(t, to, s.bound(name).Name)
		ratios = append(ratios, plain/copied)
		t.Logf("%d MiB: a plain copy %.2f s, the driver's %.2f s, from the claim to its volume %.2f s", mibs, plain, copied, whole)
		s.delete(pods, name)
		s.delete(claims, name)
	}
	t.Logf("the copy has %.2f of the throughput of a plain one (%.2f)", median(ratios), ratios)
	// Far below the least that was seen, and above what a fault would leave.
	if median(ratios) < 0.5 {
		t.Error("a restore on another node takes more than twice as long as a plain copy")
	}
}

// copyTime reads in the driver's log how long a copy took, in seconds.
func copyTime(t *testing.T, node, volume string) float64 {
	t.Helper()
	log, err := kube.CoreV1().Pods(system).GetLogs(nodePod(t, node), &corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	must(t, err)
	for line := range strings.SplitSeq(string(log), "\n") {
		if strings.Contains(line, `"Copy ends"`) && strings.Contains(line, volume) {
			_, after, _ := strings.Cut(line, `duration="`)
			text, _, _ := strings.Cut(after, `"`)
			took, err := time.ParseDuration(text)
			must(t, err)
			return took.Seconds()
		}
	}
	t.Fatalf("the log of the driver on %s has no end of the copy of %s", node, volume)
	return 0
}
