package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A class of limits.
const limitsYAML = `
apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: ${name}}
driverName: csi.orlop.dev
parameters: {${limits}}
`

// A claim whose volume is limited.
const limitedClaimYAML = claimYAML + `
  volumeAttributesClassName: ${limits}
`

// TestIOLimits shows that fio in a pod is as fast as the volume's class says and
// no faster, when the pod starts, when the claim gets another class while it
// runs, and when the driver has been restarted. A class that makes no sense
// changes nothing.
func TestIOLimits(t *testing.T) {
	for _, mode := range []struct{ name, claim, pod, file string }{
		{"Filesystem", limitedClaimYAML, podYAML, "/data/file"},
		{"Block", limitedClaimYAML + "\n  volumeMode: Block\n", blockPodYAML, "/dev/data"},
	} {
		t.Run(mode.name, func(t *testing.T) {
			s := newSpace(t)
			class := func(name string) string { return s.name + "-" + name }
			for name, limits := range map[string]string{
				"silver":    `writeIOPS: "100", readBandwidth: 1Mi`,
				"gold":      `writeIOPS: "250", readBandwidth: 2Mi`,
				"senseless": `writeIOPS: "0"`,
				"unlimited": `readIOPS: "", writeIOPS: "", readBandwidth: "", writeBandwidth: ""`,
			} {
				s.apply(limitsYAML, "name", class(name), "limits", limits)
			}
			s.apply(join(mode.claim, mode.pod), "claim", "data", "class", "orlop", "size", "256Mi", "limits", class("silver"), "pod", "app")
			node := s.runs("app").Spec.NodeName
			s.sh("app", "dd if=/dev/urandom of="+mode.file+" bs=1M count=32 oflag=direct 2>/dev/null")

			s.fio("app", "write", mode.file, 100)
			s.fio("app", "read", mode.file, 256)
			s.modify("data", class("gold"))
			s.fio("app", "write", mode.file, 250)
			s.fio("app", "read", mode.file, 512)

			patch(t, s.in(claims), "data", "spec: {volumeAttributesClassName: "+class("senseless")+"}")
			await(t, s.in(claims), "data", "told that its class makes no sense", func(c *corev1.PersistentVolumeClaim) (bool, error) {
				if c == nil {
					return false, errGone
				}
				status := c.Status.ModifyVolumeStatus
				return status != nil && status.Status == corev1.PersistentVolumeClaimModifyVolumeInfeasible, nil
			})
			remove(t, resource(t, pods, system), nodePod(t, node))
			served(t, node)
			s.fio("app", "write", mode.file, 250)

			s.modify("data", class("unlimited"))
			eventually(t, "fio writes without a limit", func() error {
				if got := s.rate("app", "write", mode.file); got < 300 {
					return fmt.Errorf("it does so %.1f times a second", got)
				}
				return nil
			})
			s.unharmed("app")
		})
	}
}

// modify gives a claim another class and waits until it holds.
func (s *space) modify(claim, class string) {
	s.Helper()
	patch(s.T, s.in(claims), claim, "spec: {volumeAttributesClassName: "+class+"}")
	await(s.T, s.in(claims), claim, "of class "+class, func(c *corev1.PersistentVolumeClaim) (bool, error) {
		if c == nil {
			return false, errGone
		}
		now := c.Status.CurrentVolumeAttributesClassName
		return now != nil && *now == class && c.Status.ModifyVolumeStatus == nil, nil
	})
}

// fio waits until fio reads or writes that often a second, in operations of 4
// KiB, within a tenth. A machine with other things to do may be slower for a
// while; it never is faster.
func (s *space) fio(pod, what, file string, want float64) {
	s.Helper()
	eventually(s.T, fmt.Sprintf("fio does %s of %s %.0f times a second", what, file, want), func() error {
		got := s.rate(pod, what, file)
		if got > 1.1*want {
			s.Errorf("%s of %s: %.1f times a second, the limit is %.0f", what, file, got, want)
		}
		if got < 0.9*want {
			return fmt.Errorf("it does so %.1f times", got)
		}
		s.Logf("%s: %.1f times a second, the limit is %.0f", what, got, want)
		return nil
	})
}

// rate is how often a second fio reads or writes.
func (s *space) rate(pod, what, file string) float64 {
	s.Helper()
	out := s.sh(pod, "fio --name=job --filename="+file+" --size=32M --bs=4k --direct=1 --ioengine=psync --rw=rand"+what+
		" --time_based --ramp_time=2 --runtime=8 --output-format=json")
	var report struct {
		Jobs []map[string]json.RawMessage `json:"jobs"`
	}
	_, object, _ := strings.Cut("\n"+out, "\n{") // behind what it has to remark
	must(s.T, json.Unmarshal([]byte("{"+object), &report))
	var job struct {
		IOPS float64 `json:"iops"`
	}
	must(s.T, json.Unmarshal(report.Jobs[0][what], &job))
	return job.IOPS
}
