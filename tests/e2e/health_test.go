package e2e

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestEventsOfHealth shows that the owner of a claim is told what is wrong with
// its volume, once, and that it is mended, though the controller has two pods;
// and that the metrics of the node tell it as long as it is so.
func TestEventsOfHealth(t *testing.T) {
	s := newSpace(t)
	s.apply(join(claimYAML, podYAML), "claim", "data", "class", "orlop", "size", "64Mi", "pod", "app")
	node := s.runs("app").Spec.NodeName
	handle := s.bound("data").Spec.CSI.VolumeHandle
	image := path.Join("/var/lib/orlop/mounts/default/volumes", path.Base(handle), "data")
	driver := nodePod(t, node)
	move := func(from, to string) {
		_, err := run(system, driver, container, "mv", from, to)
		must(t, err)
	}
	metric := fmt.Sprintf(`orlop_volume_condition{reason="ImageMissing",status="data_loss",volume=%q}`, handle)
	reported := func() bool {
		page, err := metrics(driver, nodeMetrics)
		must(t, err)
		return strings.Contains(page, metric+" 1")
	}
	if reported() {
		t.Error("a volume that is well has a condition")
	}

	move(image, image+".gone")
	t.Cleanup(func() { _, _ = run(system, driver, container, "mv", "-n", image+".gone", image) })
	if !reported() {
		t.Errorf("the metrics of %s do not tell of %s", node, metric)
	}
	warning := s.told("data", "ImageMissing")
	if warning.Type != corev1.EventTypeWarning || !strings.Contains(warning.Message, "restore") {
		t.Errorf("the event is %s: %s", warning.Type, warning.Message)
	}
	move(image+".gone", image)
	if reported() {
		t.Error("the metrics tell of what is mended")
	}
	s.told("data", "Mended")
	for _, reason := range []string{"ImageMissing", "Mended"} {
		if e := s.told("data", reason); e.Count != 1 {
			t.Errorf("%s was told %d times", reason, e.Count)
		}
	}
	s.unharmed("app")
}

// told waits for the one event of that reason at a claim.
func (s *space) told(claim, reason string) (event corev1.Event) {
	s.Helper()
	eventually(s.T, "claim "+claim+" has the event "+reason, func() error {
		list, err := kube.CoreV1().Events(s.name).List(context.Background(), metav1.ListOptions{
			FieldSelector: "involvedObject.kind=PersistentVolumeClaim,involvedObject.name=" + claim + ",reason=" + reason,
		})
		if err != nil {
			return err
		}
		if len(list.Items) == 0 {
			return errors.New("there is none")
		}
		if len(list.Items) > 1 {
			s.Fatalf("there are %d: %v", len(list.Items), list.Items)
		}
		event = list.Items[0]
		return nil
	})
	return event
}
