package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

// Resources that tests name often.
const (
	pods      = "pods"
	claims    = "persistentvolumeclaims"
	volumes   = "persistentvolumes"
	snapshots = "volumesnapshots.snapshot.storage.k8s.io"
	contents  = "volumesnapshotcontents.snapshot.storage.k8s.io"
)

// A space is the namespace of one test.
type space struct {
	*testing.T
	name  string
	since time.Time
	end   []func() // what is not in the namespace, and is removed after it
}

// newSpace makes a namespace for the test. At the end of the test it is removed,
// and it is a failure if that leaves a volume or a snapshot behind.
func newSpace(t *testing.T) *space {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	name = fmt.Sprintf("e2e-%s-%s", strings.TrimPrefix(name, "test"), stamp())
	s := &space{T: t, name: name, since: time.Now().Add(-time.Second)}
	t.Cleanup(s.clear)
	s.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: ${name}}}`, "name", name)
	// A pod can start only when its namespace has its service account.
	await(t, resource(t, "serviceaccounts", name), "default", "there", func(a *corev1.ServiceAccount) (bool, error) { return a != nil, nil })
	return s
}

// stamp is short and differs from one call to the next, also in another run.
func stamp() string {
	n := time.Now().UnixMicro()
	return fmt.Sprintf("%06x", n/1000&0xffffff)
}

func (s *space) clear() {
	if s.Failed() {
		s.explain()
	}
	defer func() {
		for _, f := range s.end {
			f()
		}
	}()
	ctx := context.Background()
	remove(s.T, resource(s.T, "namespaces", ""), s.name)
	await(s.T, resource(s.T, "namespaces", ""), s.name, "gone", func(n *corev1.Namespace) (bool, error) { return n == nil, nil })
	eventually(s.T, "the volumes of the test are deleted", func() error {
		all, err := kube.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, v := range all.Items {
			if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == s.name {
				return fmt.Errorf("%s of claim %s is %s %s", v.Name, v.Spec.ClaimRef.Name, v.Status.Phase, v.Status.Message)
			}
		}
		return nil
	})
	eventually(s.T, "the snapshots of the test are deleted", func() error {
		all, err := resource(s.T, contents, "").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, o := range all.Items {
			c := as[snapshotContent](s.T, &o)
			if c.Spec.VolumeSnapshotRef.Namespace == s.name {
				return fmt.Errorf("%s of snapshot %s is left", c.Name, c.Spec.VolumeSnapshotRef.Name)
			}
		}
		return nil
	})
}

// apply makes what a text in YAML says. What is not in the namespace is removed
// at the end of the test as well.
func (s *space) apply(text string, pairs ...string) {
	s.Helper()
	for _, o := range parse(s.T, text, pairs...) {
		in, namespaced := create(s.T, o, s.name)
		if !namespaced && o.GetKind() != "Namespace" {
			s.end = append(s.end, func() { remove(s.T, in, o.GetName()) })
		}
	}
}

// in gives access to the objects of a resource in the space.
func (s *space) in(name string) dynamic.ResourceInterface {
	s.Helper()
	return resource(s.T, name, s.name)
}

// delete deletes an object and waits until it is gone.
func (s *space) delete(resource, name string) {
	s.Helper()
	remove(s.T, s.in(resource), name)
	await(s.T, s.in(resource), name, "gone", func(o *metav1.PartialObjectMetadata) (bool, error) { return o == nil, nil })
}

// runs waits until pods are ready, and gives the last.
func (s *space) runs(names ...string) (p *corev1.Pod) {
	s.Helper()
	for _, name := range names {
		p = await(s.T, s.in(pods), name, "ready", isReady)
	}
	return p
}

// isReady is the condition that a pod is ready; one that has ended never is.
func isReady(p *corev1.Pod) (bool, error) {
	switch {
	case p == nil:
		return false, nil
	case p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded:
		return false, fmt.Errorf("it has ended: %s %s", p.Status.Phase, p.Status.Message)
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue, nil
		}
	}
	return false, nil
}

// sh runs a shell script in the first container of a pod and gives what it
// printed, without white space around it.
func (s *space) sh(pod, script string) string {
	s.Helper()
	out, err := s.try(pod, script)
	must(s.T, err)
	return out
}

func (s *space) try(pod, script string) (string, error) {
	out, err := run(s.name, pod, "", "sh", "-ec", script)
	return strings.TrimSpace(out), err
}

// bound waits until a claim is bound, and gives its volume.
func (s *space) bound(claim string) *corev1.PersistentVolume {
	s.Helper()
	c := await(s.T, s.in(claims), claim, "bound", func(c *corev1.PersistentVolumeClaim) (bool, error) {
		return c != nil && c.Status.Phase == corev1.ClaimBound, nil
	})
	v, err := kube.CoreV1().PersistentVolumes().Get(context.Background(), c.Spec.VolumeName, metav1.GetOptions{})
	must(s.T, err)
	return v
}

// A snapshot is what tests read of a VolumeSnapshot.
type snapshot struct {
	metav1.ObjectMeta `json:"metadata"`
	Status            struct {
		ReadyToUse                     bool   `json:"readyToUse"`
		BoundVolumeSnapshotContentName string `json:"boundVolumeSnapshotContentName"`
		RestoreSize                    string `json:"restoreSize"`
	} `json:"status"`
}

// A snapshotContent is what tests read of a VolumeSnapshotContent.
type snapshotContent struct {
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		VolumeSnapshotRef corev1.ObjectReference `json:"volumeSnapshotRef"`
	} `json:"spec"`
	Status struct {
		SnapshotHandle string `json:"snapshotHandle"`
	} `json:"status"`
}

// cut waits until a snapshot is ready to use.
func (s *space) cut(name string) *snapshot {
	s.Helper()
	return await(s.T, s.in(snapshots), name, "ready to use", func(o *snapshot) (bool, error) {
		return o != nil && o.Status.ReadyToUse, nil
	})
}

// eventsAbout gives the messages of the events about an object, oldest first.
func (s *space) eventsAbout(kind, name string) (messages []string) {
	s.Helper()
	list, err := kube.CoreV1().Events(s.name).List(context.Background(), metav1.ListOptions{})
	must(s.T, err)
	for _, e := range list.Items {
		if e.InvolvedObject.Kind == kind && e.InvolvedObject.Name == name {
			messages = append(messages, e.Reason+": "+e.Message)
		}
	}
	return messages
}

// explain logs what tells why a test failed: events, and the state of pods and
// claims. The whole, with the logs of all pods and of the driver since the
// test began, goes to the test's artifacts.
func (s *space) explain() {
	ctx := context.Background()
	dir := s.ArtifactDir()
	list, err := kube.CoreV1().Events(s.name).List(ctx, metav1.ListOptions{})
	if err == nil {
		slices.SortFunc(list.Items, func(a, b corev1.Event) int { return when(a).Compare(when(b)) })
		for _, e := range list.Items {
			s.Logf("event %s %s/%s %s: %s", when(e).Format(time.TimeOnly), e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	for _, name := range []string{pods, claims, volumes, snapshots, contents, "nodes", "csinodes.storage.k8s.io", "csistoragecapacities.storage.k8s.io"} {
		in := resource(s.T, name, s.name)
		if strings.HasPrefix(name, "csistoragecapacities") {
			in = resource(s.T, name, system)
		}
		all, err := in.List(ctx, metav1.ListOptions{})
		if err != nil {
			s.Logf("listing %s: %v", name, err)
			continue
		}
		var text strings.Builder
		for _, o := range all.Items {
			o.SetManagedFields(nil)
			document, _ := yaml.Marshal(o.Object)
			fmt.Fprintf(&text, "---\n%s", document)
			if name == pods {
				s.Logf("pod %s: %v", o.GetName(), o.Object["status"])
			}
		}
		s.keep(dir, name+".yaml", text.String())
	}
	for _, namespace := range []string{s.name, system} {
		s.keepLogs(dir, namespace)
	}
	s.Logf("more is in %s, if the tests run with -artifacts", dir)
}

func when(e corev1.Event) time.Time {
	if !e.LastTimestamp.IsZero() {
		return e.LastTimestamp.Time
	}
	return e.EventTime.Time
}

func (s *space) keepLogs(dir, namespace string) {
	ctx := context.Background()
	list, err := kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		s.Logf("listing pods: %v", err)
		return
	}
	since := metav1.NewTime(s.since)
	for _, p := range list.Items {
		for _, c := range p.Spec.Containers {
			for _, previous := range []bool{true, false} {
				stream, err := kube.CoreV1().Pods(namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: c.Name, SinceTime: &since, Previous: previous}).Stream(ctx)
				if apierrors.IsBadRequest(err) {
					continue // it has not been started again, or not started yet
				}
				if err != nil {
					s.Logf("log of %s/%s: %v", p.Name, c.Name, err)
					continue
				}
				log, _ := io.ReadAll(stream)
				stream.Close()
				name := fmt.Sprintf("%s-%s-%s.log", namespace, p.Name, c.Name)
				if previous {
					name = "previous-" + name
				}
				s.keep(dir, name, string(log))
			}
		}
	}
}

func (s *space) keep(dir, name, content string) {
	if content == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		s.Log(err)
	}
}
