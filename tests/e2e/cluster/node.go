package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/orlop-csi/orlop/tests/e2e/build"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Nodes is how many nodes a cluster has: they are called node-1, node-2 and so on.
const Nodes = 3

// Node is a node: containerd, kubelet and kube-proxy in namespaces of their own.
// Loop devices and the kernel are those of the machine, shared by all.
type Node struct {
	Name    string
	Address string // in the node network

	machine machine
	index   int // from 1
	cluster *Cluster
}

// Path tells where a file of the node is on this machine: /var/lib/… and
// /var/log/… of a node are directories of the cluster. It is so also while the
// node is not running. Mounts are not followed: see [Node.Exec].
func (n *Node) Path(path string) string { return filepath.Join(n.machine.dir(), path) }

// Exec runs a command on the node as root, outside of any container, and gives
// what it printed to its standard output.
func (n *Node) Exec(ctx context.Context, name string, args ...string) (string, error) {
	return n.machine.output(ctx, name, args...)
}

// Running tells whether the node runs.
func (n *Node) Running() (bool, error) {
	pid, err := n.machine.pid()
	return pid != 0, err
}

// Kill ends all that runs on the node at once, as a power failure does: the
// kubelet, containerd, the pods; mounts and loop devices are gone, too. What was
// written and not synced may stay: the kernel goes on. The node's object stays in
// the API: Kubernetes finds the node not ready after 40 seconds.
func (n *Node) Kill(ctx context.Context) error {
	if err := n.machine.halt(ctx); err != nil {
		return err
	}
	return detachLoops(ctx, n.machine.dir())
}

// Remove kills the node, deletes its object from the API, and its disk: all that
// was in its directories. [Node.Start] makes it a new node of the same name.
func (n *Node) Remove(ctx context.Context) error {
	if err := n.Kill(ctx); err != nil {
		return err
	}
	client, err := n.cluster.clientset()
	if err != nil {
		return err
	}
	if err := client.CoreV1().Nodes().Delete(ctx, n.Name, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("delete node %s: %w", n.Name, err)
	}
	return removeAll(n.machine.dir())
}

// Start starts a node that does not run, and waits until it is ready. What it had
// in /var/lib is there again.
func (n *Node) Start(ctx context.Context) error {
	if err := n.boot(ctx); err != nil {
		return err
	}
	images, err := n.cluster.images()
	if err != nil {
		return err
	}
	if err := n.load(ctx, images); err != nil {
		return err
	}
	return n.join(ctx)
}

// RestartKubelet kills the kubelet and starts it again; pods go on. It waits until
// the new one is healthy.
func (n *Node) RestartKubelet(ctx context.Context) error {
	if err := n.StopKubelet(ctx); err != nil {
		return err
	}
	return n.StartKubelet(ctx)
}

// StopKubelet kills the kubelet; pods go on, and nobody looks after them.
func (n *Node) StopKubelet(ctx context.Context) error {
	return n.machine.stop(ctx, "kubelet", syscall.SIGKILL)
}

// StartKubelet starts a kubelet that was stopped.
func (n *Node) StartKubelet(ctx context.Context) error {
	if err := n.startKubelet(); err != nil {
		return err
	}
	return poll(ctx, 2*time.Minute, "the kubelet of "+n.Name+" to be healthy", func(ctx context.Context) error {
		_, err := n.Exec(ctx, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/10248 && printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q '200 OK' <&3")
		return err
	})
}

// boot starts the node's namespaces and containerd.
func (n *Node) boot(ctx context.Context) error {
	if err := n.machine.boot(ctx); err != nil {
		return err
	}
	if err := makeCgroups(n.Name); err != nil {
		return err
	}
	if err := n.cluster.network.attachNode(ctx, control, n.machine, n.index); err != nil {
		return err
	}
	if err := n.configure(); err != nil {
		return err
	}
	if err := n.machine.start("containerd", "--config", n.config("containerd.toml")); err != nil {
		return err
	}
	return poll(ctx, 2*time.Minute, "containerd of "+n.Name+"; see "+n.machine.logs(), func(context.Context) error {
		socket, err := n.machine.file("/run/containerd/containerd.sock")
		if err != nil {
			return err
		}
		connection, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return connection.Close()
	})
}

// join starts the kubelet and kube-proxy, and waits until the node is ready.
func (n *Node) join(ctx context.Context) error {
	if err := errors.Join(n.startKubelet(), n.machine.start("kube-proxy", "--config", n.config("proxy.yaml"), "--hostname-override", n.Name)); err != nil {
		return err
	}
	client, err := n.cluster.clientset()
	if err != nil {
		return err
	}
	started := time.Now()
	return poll(ctx, 3*time.Minute, n.Name+" to be ready; see "+n.machine.logs(), func(ctx context.Context) error {
		node, err := client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type != corev1.NodeReady {
				continue
			}
			// Not what the kubelet of an earlier life said.
			if condition.Status == corev1.ConditionTrue && condition.LastHeartbeatTime.After(started.Add(-time.Second)) {
				return nil
			}
			return fmt.Errorf("it is not: %s", condition.Message)
		}
		return errors.New("it has no condition yet")
	})
}

func (n *Node) startKubelet() error {
	return n.machine.start("kubelet",
		"--config", n.config("kubelet.yaml"), "--kubeconfig", n.config("kubelet.kubeconfig"),
		"--hostname-override", n.Name, "--node-ip", n.Address, "--cert-dir", n.config("kubelet-pki"))
}

func (n *Node) config(name string) string { return filepath.Join(n.machine.dir(), "config", name) }

// configure writes the configuration of the node's daemons.
func (n *Node) configure() error {
	if err := os.MkdirAll(n.config("cni"), 0o755); err != nil {
		return err
	}
	replace := strings.NewReplacer(
		"$CONFIG", n.config(""),
		"$CNI", cniPlugins,
		"$CA", filepath.Join(control.dir(), "pki/ca.crt"),
		"$NODE", n.Name,
		"$CGROUP", filepath.Join("/", clusterName, n.Name),
		"$PAUSE", build.PauseImage,
		"$PODS", n.cluster.network.podsOf(n.index),
		"$CLUSTERPODS", n.cluster.network.pods(),
		"$TAINTS", n.cluster.taints(),
		"$GATES", strings.ReplaceAll(gates, "=", ": "),
	)
	for name, text := range configuration {
		if err := os.WriteFile(n.config(name), []byte(replace.Replace(text)), 0o644); err != nil {
			return err
		}
	}
	for name, client := range map[string]string{"kubelet": n.Name, "proxy": "proxy"} {
		data, err := os.ReadFile(filepath.Join(control.dir(), "pki", client+".kubeconfig"))
		if err != nil {
			return err
		}
		if err := os.WriteFile(n.config(name+".kubeconfig"), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// cniPlugins is where Debian's package has them.
const cniPlugins = "/usr/lib/cni"

// configuration is by name of the file. Paths that a node has for itself, those in
// /run, /var/lib and /var/log, are the daemons' defaults.
var configuration = map[string]string{
	// ptp and not bridge: each packet of a pod is routed, so that a Service leads
	// to pods of the same node without br_netfilter.
	"cni/10-pods.conflist": `{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "ptp",
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`,
	// restrict_oom_score_adj: in a container, this process may itself have no
	// CAP_SYS_RESOURCE to lower a score with.
	"containerd.toml": `version = 3

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["$CNI"]
  conf_dir = "$CONFIG/cni"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "$PAUSE"
`,
	// Images are nowhere to pull from: a full disk must not make the kubelet
	// collect them, nor evict pods.
	"kubelet.yaml": `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {x509: {clientCAFile: $CA}}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: $CGROUP
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
evictionHard: {memory.available: 10Mi, nodefs.available: 0%, imagefs.available: 0%, nodefs.inodesFree: 0%, imagefs.inodesFree: 0%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
maxPods: 200
resolvConf: ""
registerWithTaints: $TAINTS
volumeStatsAggPeriod: 10s
featureGates: {$GATES}
`,
	"proxy.yaml": `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $CONFIG/proxy.kubeconfig}
mode: iptables
clusterCIDR: $CLUSTERPODS
# The limit is the whole machine's.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`,
}
