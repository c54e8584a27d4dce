package e2e

import (
	"context"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// driverPods gives the pods of the DaemonSet ("node") or Deployment
// ("controller") that are not about to end.
func driverPods(t testing.TB, component string) (running []corev1.Pod) {
	t.Helper()
	list, err := kube.CoreV1().Pods(system).List(context.Background(), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/name=orlop,app.kubernetes.io/component=" + component,
	})
	must(t, err)
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			running = append(running, p)
		}
	}
	if len(running) == 0 {
		t.Fatalf("there is no pod of the %s", component)
	}
	return running
}

// nodePod gives the name of the driver's pod on a node.
func nodePod(t testing.TB, node string) string {
	t.Helper()
	for _, p := range driverPods(t, "node") {
		if p.Spec.NodeName == node {
			return p.Name
		}
	}
	t.Fatalf("the driver has no pod on %s", node)
	return ""
}

// get reads a page that a pod of the driver serves.
func get(pod string, port int, path string) (string, error) {
	page, err := kube.CoreV1().RESTClient().Get().Namespace(system).Resource("pods").Name(fmt.Sprintf("%s:%d", pod, port)).
		SubResource("proxy").Suffix(path).DoRaw(context.Background())
	return string(page), err
}

func metrics(pod string, port int) (string, error) { return get(pod, port, "metrics") }

// count sums up a gauge of the pools over all nodes.
func count(t testing.TB, name string) (total int) {
	t.Helper()
	for _, node := range nodes {
		page, err := metrics(nodePod(t, node), nodeMetrics)
		must(t, err)
		n, err := sample(page, name+`{pool="default"}`)
		must(t, err)
		total += int(n)
	}
	return total
}

// restartPods replaces every pod of the driver of that component, as `kubectl
// rollout restart` does it and as an upgrade would, and waits for the end.
func restartPods(t testing.TB, component string) {
	t.Helper()
	change := fmt.Sprintf(`{spec: {template: {metadata: {annotations: {kubectl.kubernetes.io/restartedAt: %q}}}}}`, stamp())
	if component == "node" {
		sets := resource(t, "daemonsets.apps", system)
		patch(t, sets, nodeSet, change)
		await(t, sets, nodeSet, "rolled out", func(o *appsv1.DaemonSet) (bool, error) {
			if o == nil {
				return false, errGone
			}
			st := o.Status
			return st.ObservedGeneration == o.Generation && st.UpdatedNumberScheduled == st.DesiredNumberScheduled &&
				st.NumberReady == st.DesiredNumberScheduled && st.NumberUnavailable == 0, nil
		})
		return
	}
	deployments := resource(t, "deployments.apps", system)
	patch(t, deployments, controllers, change)
	await(t, deployments, controllers, "rolled out", func(o *appsv1.Deployment) (bool, error) {
		if o == nil {
			return false, errGone
		}
		st := o.Status
		return st.ObservedGeneration == o.Generation && st.UpdatedReplicas == *o.Spec.Replicas &&
			st.AvailableReplicas == *o.Spec.Replicas && st.Replicas == *o.Spec.Replicas, nil
	})
}
