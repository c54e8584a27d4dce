package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/kubernetes"
)

// control is the machine of the control plane. It is no node: nothing is
// scheduled on it.
var control = machine{name: "control-plane"}

// gates are what the tests need and Kubernetes does not have on by default.
const gates = "CSIVolumeHealth=true"

// startControlPlane starts etcd, the API server and what works for it, and waits
// until each of them is ready.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	if err := control.boot(ctx); err != nil {
		return err
	}
	if err := c.network.attachControlPlane(ctx, control); err != nil {
		return err
	}
	a, err := newAuthority(filepath.Join(control.dir(), "pki"), "https://"+c.network.api()+":6443")
	if err != nil {
		return err
	}
	if err := c.issue(a); err != nil {
		return err
	}
	if err := control.start("etcd",
		"--data-dir", filepath.Join(control.dir(), "etcd"),
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380",
		"--unsafe-no-fsync", // what is in it ends with the cluster
	); err != nil {
		return err
	}
	if err := control.start("kube-apiserver",
		"--etcd-servers", "http://127.0.0.1:2379",
		"--bind-address", "0.0.0.0", "--advertise-address", c.network.api(), "--secure-port", "6443",
		"--service-cluster-ip-range", c.network.services(),
		"--tls-cert-file", a.file("apiserver.crt"), "--tls-private-key-file", a.file("apiserver.key"), "--client-ca-file", a.file("ca.crt"),
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", a.file("service-accounts.pub"), "--service-account-signing-key-file", a.file("service-accounts.key"),
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--allow-privileged",
		"--kubelet-client-certificate", a.file("apiserver-kubelet.crt"), "--kubelet-client-key", a.file("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types", "InternalIP", // exec, logs, attach
		"--feature-gates", gates,
	); err != nil {
		return err
	}
	client, err := c.clientset()
	if err != nil {
		return err
	}
	if err := poll(ctx, 3*time.Minute, "the API server to be ready; see "+control.logs(), func(ctx context.Context) error {
		return ready(ctx, client)
	}); err != nil {
		return err
	}
	if err := control.start("kube-controller-manager",
		"--kubeconfig", a.kubeconfig("controller-manager"), "--use-service-account-credentials",
		"--service-account-private-key-file", a.file("service-accounts.key"), "--root-ca-file", a.file("ca.crt"),
		"--cluster-signing-cert-file", a.file("ca.crt"), "--cluster-signing-key-file", a.file("ca.key"),
		"--leader-elect=false", "--bind-address", "127.0.0.1",
		"--node-monitor-grace-period", "40s",
		"--feature-gates", gates,
	); err != nil {
		return err
	}
	return control.start("kube-scheduler",
		"--kubeconfig", a.kubeconfig("scheduler"), "--leader-elect=false", "--bind-address", "127.0.0.1", "--feature-gates", gates)
}

func ready(ctx context.Context, client kubernetes.Interface) error {
	return client.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
}

// issue writes all certificates of the cluster.
func (c *Cluster) issue(a *authority) error {
	if err := a.serviceAccounts(); err != nil {
		return err
	}
	if err := a.serve("apiserver", c.network.api(), c.network.firstService(), "127.0.0.1"); err != nil {
		return err
	}
	type client struct {
		name, user string
		groups     []string
	}
	clients := []client{
		{"admin", "admin", []string{"system:masters"}},
		{"apiserver-kubelet", "kube-apiserver-kubelet-client", []string{"system:masters"}},
		{"controller-manager", "system:kube-controller-manager", nil},
		{"scheduler", "system:kube-scheduler", nil},
		{"proxy", "system:kube-proxy", nil},
		{"snapshot-controller", "snapshot-controller", []string{"system:masters"}},
	}
	for _, n := range c.Nodes() {
		clients = append(clients, client{n.Name, "system:node:" + n.Name, []string{"system:nodes"}})
	}
	for _, client := range clients {
		if err := a.client(client.name, client.user, client.groups...); err != nil {
			return fmt.Errorf("certificate of %s: %w", client.user, err)
		}
	}
	config, err := os.ReadFile(a.kubeconfig("admin"))
	if err != nil {
		return err
	}
	return os.WriteFile(Kubeconfig, config, 0o600)
}

// startSnapshotController starts what a distribution of Kubernetes brings for
// snapshots. It is as little Orlop's part as the scheduler.
func (c *Cluster) startSnapshotController(ctx context.Context) error {
	if _, err := c.Kubectl(ctx, "apply", "--server-side", "--kustomize", c.crds); err != nil {
		return err
	}
	return control.start("snapshot-controller",
		"--kubeconfig", filepath.Join(control.dir(), "pki/snapshot-controller.kubeconfig"),
		"--feature-gates", "CSIVolumeGroupSnapshot=true", "--leader-election=false")
}
