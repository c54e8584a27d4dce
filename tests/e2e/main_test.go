// Package e2e tests Orlop as its users meet it: on a Kubernetes cluster with
// several nodes, where it was installed with its own manifests. A test applies
// YAML that a user could have written, and looks at the data in the volumes,
// not only at what objects say.
//
// The cluster is the one of the KUBECONFIG that is set, or else the one that
// `make cluster-up` started. Tests that stop nodes or kubelets need the latter.
//
//	go test -run TestSmoke ./tests/e2e     # the short ones
//	go test -artifacts ./tests/e2e         # keeps what failing tests collected
//
// What a test makes is in a namespace of its own (and named after it, where it
// cannot be in one), and goes with it, also when the test fails.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/orlop-csi/orlop/tests/e2e/build"
)

// The names that are part of an installation.
const (
	driverName   = "csi.orlop.dev"
	topologyKey  = "topology.csi.orlop.dev/node"
	system       = "orlop-system"
	nodeSet      = "orlop-node"       // DaemonSet, Service, and service account
	controllers  = "orlop-controller" // Deployment, and service account
	container    = "csi-driver"       // in the pods of both
	peerPort     = 9810
	nodeMetrics  = 9811
	routeMetrics = 9812
)

var (
	// patience is how long anything may take that should take seconds. The
	// machine may be small, and have other things to do.
	patience time.Duration

	// image is what test pods run: a shell, and what is usual beside it.
	image = flag.String("image", build.ToolsImage, "image of the test pods: a shell with dd, sha256sum, awk")

	// nodes are those that the driver serves, sorted.
	nodes []string
)

func TestMain(m *testing.M) {
	flag.DurationVar(&patience, "patience", 5*time.Minute, "how long a test waits for anything before it fails")
	flag.Parse()
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// prepare connects to the cluster and waits until Orlop serves it.
func prepare() error {
	if err := connect(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the cluster is not ready for tests: %w", err)
		case <-time.After(time.Second):
		}
	}
}

// ready says what is missing before tests can begin, and notes the nodes.
func ready(ctx context.Context) error {
	set, err := kube.AppsV1().DaemonSets(system).Get(ctx, nodeSet, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if s := set.Status; s.DesiredNumberScheduled == 0 || s.NumberReady < s.DesiredNumberScheduled {
		return fmt.Errorf("%d of %d pods of %s are ready", s.NumberReady, s.DesiredNumberScheduled, nodeSet)
	}
	deployment, err := kube.AppsV1().Deployments(system).Get(ctx, controllers, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if s := deployment.Status; s.ReadyReplicas == 0 || s.ReadyReplicas < s.Replicas {
		return fmt.Errorf("%d of %d pods of %s are ready", s.ReadyReplicas, s.Replicas, controllers)
	}
	registered, err := kube.StorageV1().CSINodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	nodes = nil
	for _, n := range registered.Items {
		for _, d := range n.Spec.Drivers {
			if d.Name == driverName {
				nodes = append(nodes, n.Name)
			}
		}
	}
	slices.Sort(nodes)
	if len(nodes) < int(set.Status.DesiredNumberScheduled) {
		return fmt.Errorf("the driver is registered on %q, and should be on %d nodes", nodes, set.Status.DesiredNumberScheduled)
	}
	for _, name := range nodes {
		n, err := kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, taint := range n.Spec.Taints {
			if taint.Effect == corev1.TaintEffectNoSchedule {
				return fmt.Errorf("%s has the taint %s", name, taint.Key)
			}
		}
	}
	return nil
}
