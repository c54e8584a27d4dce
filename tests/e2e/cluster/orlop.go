package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/orlop-csi/orlop/tests/e2e/build"
)

// What a user has of Orlop, and no more: its manifests, with pools of his own, and
// the names in them.
const (
	manifestsDir = "tests/e2e/deploy"
	namespace    = "orlop-system"
)

var workloads = []string{"deployment/orlop-controller", "daemonset/orlop-node"}

// taints are those that a node registers with, as Orlop's documentation says: it
// takes no pod that wants a volume before it can have one.
func (c *Cluster) taints() string {
	if c.bare {
		return "[]"
	}
	return "[{key: csi.orlop.dev/not-ready, effect: NoSchedule}]"
}

// manifests renders the checkout's manifests.
func (c *Cluster) manifests(ctx context.Context, kubectl string) (string, error) {
	if c.bare {
		return "", nil
	}
	dir := filepath.Join(c.builder.Repository, manifestsDir)
	if _, err := os.Stat(dir); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, kubectl, "kustomize", dir)
	cmd.Args[0] = "kubectl" // one binary is all of Kubernetes' programs
	return output(cmd)
}

// install applies the manifests, and waits until Orlop serves every node.
func (c *Cluster) install(ctx context.Context, images []build.Image) error {
	if err := c.builder.Step("installing Orlop", func() error { return c.apply(ctx) }); err != nil {
		return err
	}
	return c.installed(images)
}

func (c *Cluster) apply(ctx context.Context) error {
	if _, err := c.Kubectl(ctx, "apply", "--kustomize", filepath.Join(c.builder.Repository, manifestsDir)); err != nil {
		return err
	}
	return c.rollout(ctx)
}

func (c *Cluster) rollout(ctx context.Context) error {
	for _, workload := range workloads {
		if _, err := c.Kubectl(ctx, "--namespace", namespace, "rollout", "status", workload, "--timeout", "5m"); err != nil {
			pods, _ := c.Kubectl(ctx, "--namespace", namespace, "get", "pods", "--output", "wide")
			return fmt.Errorf("%w\n%s", err, pods)
		}
	}
	// The router takes the taint away once the driver has registered.
	return poll(ctx, 2*time.Minute, "the nodes to be without taint", func(ctx context.Context) error {
		taints, err := c.Kubectl(ctx, "get", "nodes", "--output", "jsonpath={.items[*].spec.taints[*].key}")
		if err == nil && strings.Contains(taints, "csi.orlop.dev/not-ready") {
			err = errors.New(taints)
		}
		return err
	})
}

// A file has the key of the driver's image that the pods run.
var installedFile = Dir + "/installed"

func (c *Cluster) installed(images []build.Image) error {
	return os.WriteFile(installedFile, []byte(driverKey(images)), 0o644)
}

func driverKey(images []build.Image) string {
	for _, image := range images {
		if strings.Contains(image.Name, "/csi-driver:") {
			return image.Key
		}
	}
	return ""
}

// Update makes the running cluster run Orlop as it is in the checkout that the
// directory is in: builds its image, loads it into all nodes, applies the manifests,
// restarts the pods if the image or the configuration is another, and waits until
// they are ready.
func Update(ctx context.Context, directory string, log io.Writer) error {
	unlock, err := exclusive()
	if err != nil {
		return err
	}
	defer unlock()
	c, err := Open(directory)
	if err != nil {
		return err
	}
	c.log, c.builder.Log = log, log
	manifests, err := c.manifests(ctx, program("kubectl"))
	if err != nil {
		return err
	}
	images, err := buildImages(ctx, c.builder, manifests)
	if err != nil {
		return err
	}
	if err := writeImages(images); err != nil {
		return err
	}
	if err := c.builder.Step("loading images", func() error {
		return parallel(c.Nodes(), func(n *Node) error {
			if running, err := n.Running(); err != nil || !running {
				return err // it loads them when it starts
			}
			return n.load(ctx, images)
		})
	}); err != nil {
		return err
	}
	before, err := os.ReadFile(installedFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := c.builder.Step("applying the manifests", func() error {
		changes, err := c.Kubectl(ctx, "apply", "--kustomize", filepath.Join(c.builder.Repository, manifestsDir))
		if err != nil {
			return err
		}
		// Neither an image of the same name nor a ConfigMap restarts a pod.
		if len(before) > 0 && (string(before) != driverKey(images) || strings.Contains(changes, "configmap/orlop-pools configured")) {
			_, err = c.Kubectl(ctx, append([]string{"--namespace", namespace, "rollout", "restart"}, workloads...)...)
		}
		if err != nil {
			return err
		}
		return c.rollout(ctx)
	}); err != nil {
		return err
	}
	return c.installed(images)
}
