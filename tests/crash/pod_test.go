//go:build integration

package crash

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// podUID is that of the pod that a block volume is published for. The driver
// finds a pod by it wherever it is, also among those of another run of the test.
var podUID = fmt.Sprintf("0b9c1c5e-5c3a-4d5e-8f3e-%012x", os.Getpid())

// Target gives the path to publish a volume at. For a volume of a pod it is such
// that it tells the pod.
func (w *world) Target(name string) string {
	if name == "raw" {
		return filepath.Join(w.Dir, "kubelet/plugins/kubernetes.io/csi/volumeDevices/publish", name, podUID)
	}
	return w.Driver.Target(name)
}

// inPod makes a block volume that is published for a pod with a process in it.
func (w *world) inPod(name string) {
	w.t.Helper()
	dir := "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err != nil {
		dir = "/sys/fs/cgroup"
	}
	for _, part := range []string{fmt.Sprintf("orlop-crash-%d", os.Getpid()), "pod" + podUID, "container"} {
		dir = filepath.Join(dir, part)
		made := dir
		w.must(os.Mkdir(made, 0o755))
		w.t.Cleanup(func() {
			deadline := time.Now().Add(w.patience)
			for os.Remove(made) != nil && time.Now().Before(deadline) { // what was killed leaves in its own time
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	w.pod = filepath.Dir(dir)
	// Not a child of ours: the tracer waits for all that there are.
	pid, err := exec.Command("sh", "-c", "sleep infinity >/dev/null 2>&1 & echo $!").Output()
	w.must(err)
	process, err := strconv.Atoi(strings.TrimSpace(string(pid)))
	w.must(err)
	w.t.Cleanup(func() {
		w.thawPod() // what is stopped cannot be killed
		_ = syscall.Kill(process, syscall.SIGKILL)
	})
	w.must(os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(process)), 0))

	w.Create(name, 64*mib, block)
	w.useInPod(name)
	w.note(name)
}

// useInPod stages and publishes a volume for the pod.
func (w *world) useInPod(name string) {
	w.t.Helper()
	w.must(os.MkdirAll(filepath.Dir(w.Target(name)), 0o700))
	_, err := w.NodeStageVolume(w.Context(), &csi.NodeStageVolumeRequest{VolumeId: w.id(name), StagingTargetPath: w.Staging(name), VolumeCapability: block})
	w.must(err)
	_, err = w.NodePublishVolume(w.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: w.id(name), StagingTargetPath: w.Staging(name), TargetPath: w.Target(name), VolumeCapability: block,
	})
	w.must(err)
}

// thawPod lets the pod's processes go on.
func (w *world) thawPod() {
	for file, thawed := range podStates {
		if _, err := os.Stat(filepath.Join(w.pod, file)); err == nil {
			_ = os.WriteFile(filepath.Join(w.pod, file), []byte(thawed), 0)
		}
	}
}

// podStates are the files that tell whether a cgroup is frozen, of both versions
// of cgroups, and what they say of one that is not.
var podStates = map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"}

// podGoesOn is an error if the processes of the pod were left stopped.
func (w *world) podGoesOn() error {
	if w.pod == "" {
		return nil
	}
	for file, thawed := range podStates {
		text, err := os.ReadFile(filepath.Join(w.pod, file))
		if err == nil && strings.TrimSpace(string(text)) != thawed {
			return fmt.Errorf("the pod is frozen: %s", text)
		}
	}
	return nil
}
