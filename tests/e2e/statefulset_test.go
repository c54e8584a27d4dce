package e2e

import (
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
)

// The replicas of a StatefulSet keep each its own volume through a rolling
// restart and when there are fewer of them for a while.
func TestStatefulSet(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	const replicas = 3
	s.apply(`
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 3
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 5
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: db}}}
      containers:
      - name: main
        image: ${image}
        command: [sh, -c, "cat /etc/hostname >>/data/starts; sync; trap exit TERM; sleep 1000000 & wait"]
        volumeMounts: [{name: data, mountPath: /data}]
        readinessProbe: {exec: {command: [test, -s, /data/starts]}, periodSeconds: 1, timeoutSeconds: 30}
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      storageClassName: orlop-xfs
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: 300Mi}}
`)
	sets := s.in("statefulsets.apps")
	settled := func(want int32) {
		t.Helper()
		await(t, sets, "db", "settled", func(o *appsv1.StatefulSet) (bool, error) {
			if o == nil {
				return false, errGone
			}
			st := o.Status
			return st.ObservedGeneration == o.Generation && st.Replicas == want && st.ReadyReplicas == want &&
				st.UpdatedReplicas == want && st.CurrentRevision == st.UpdateRevision, nil
		})
	}
	settled(replicas)
	where, sums := map[string]string{}, map[string]string{}
	used := map[string]bool{}
	for i := range replicas {
		pod := fmt.Sprintf("db-%d", i)
		where[pod] = s.runs(pod).Spec.NodeName
		used[where[pod]] = true
		sums[pod] = s.sh(pod, fill("/data/file", 4))
	}
	if want := min(replicas, len(nodes)); len(used) != want {
		t.Errorf("%d replicas run on %d nodes, want %d", replicas, len(used), want)
	}
	check := func(starts string) {
		t.Helper()
		for i := range replicas {
			pod := fmt.Sprintf("db-%d", i)
			if node := s.runs(pod).Spec.NodeName; node != where[pod] {
				t.Errorf("%s was on %s, where its volume is, and is on %s", pod, where[pod], node)
			}
			if got := s.sh(pod, sum("/data/file")); got != sums[pod] {
				t.Errorf("the file of %s was %s, and is %s", pod, sums[pod], got)
			}
			if got := s.sh(pod, "sort /data/starts | uniq -c | awk '{ print $1, $2 }'"); got != starts+" "+pod {
				t.Errorf("the volume of %s was used by %q, want %q", pod, got, starts+" "+pod)
			}
		}
	}
	// As `kubectl rollout restart statefulset/db` does it.
	patch(t, sets, "db", `{spec: {template: {metadata: {annotations: {kubectl.kubernetes.io/restartedAt: "now"}}}}}`)
	settled(replicas)
	check("2")

	patch(t, sets, "db", `{spec: {replicas: 0}}`)
	settled(0)
	patch(t, sets, "db", `{spec: {replicas: 3}}`)
	settled(replicas)
	check("3")
}
