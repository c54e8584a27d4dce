// Package cluster runs a real Kubernetes on this machine: etcd, API server,
// controller manager and scheduler in one set of namespaces, and three nodes, each
// containerd, kubelet and kube-proxy in namespaces of its own. Tests use it through
// [Open]; the command in cmd/cluster starts and stops it.
//
// All that it makes is in [Dir], in the namespaces, in cgroups called like that and
// behind one network link of that name; [Down] removes all of it, also after a crash
// at any moment. It must run as root.
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/orlop-csi/orlop/tests/e2e/build"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Kubeconfig is the file that makes a client the cluster's administrator.
var Kubeconfig = Dir + "/kubeconfig"

// Cluster is the cluster of this machine.
type Cluster struct {
	network network
	builder *build.Builder
	crds    string // directory of the snapshot CRDs
	bare    bool   // without Orlop
	log     io.Writer
}

// Open gives the cluster that is running. The directory is in the checkout whose
// images it is to use.
func Open(directory string) (*Cluster, error) {
	c := &Cluster{log: io.Discard}
	var err error
	if c.builder, err = build.New(directory, io.Discard); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(Dir, "network.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("no cluster is running: start it with make cluster-up")
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &c.network); err != nil {
		return nil, fmt.Errorf("read network.json: %w", err)
	}
	bare, incomplete := os.ReadFile(completeFile)
	c.bare = string(bare) == bareCluster
	if pid, err := control.pid(); err != nil || pid == 0 || incomplete != nil {
		return nil, errors.Join(err, errors.New("no cluster is running, but there is what is left of one: start it with make cluster-up"))
	}
	return c, nil
}

// RESTConfig is the administrator's, without a limit on requests.
func (c *Cluster) RESTConfig() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", Kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	return config, nil
}

func (c *Cluster) clientset() (kubernetes.Interface, error) {
	config, err := c.RESTConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// Nodes gives all nodes, running or not.
func (c *Cluster) Nodes() []*Node {
	var nodes []*Node
	for i := 1; i <= Nodes; i++ {
		name := fmt.Sprintf("node-%d", i)
		nodes = append(nodes, &Node{Name: name, Address: c.network.node(i), machine: machine{name}, index: i, cluster: c})
	}
	return nodes
}

// Node gives a node by its name, or nil.
func (c *Cluster) Node(name string) *Node {
	for _, node := range c.Nodes() {
		if node.Name == name {
			return node
		}
	}
	return nil
}

// Kubectl runs kubectl as the administrator, and gives what it printed to its
// standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is [Cluster.Kubectl] with a standard input: for `apply --filename -`.
func (c *Cluster) KubectlInput(ctx context.Context, input string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program("kubectl"), append([]string{"--kubeconfig", Kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	cmd.Env = append(os.Environ(), "KUBECACHEDIR="+filepath.Join(Dir, "kubectl-cache"))
	return output(cmd)
}

// Up starts a cluster, with Orlop on it as it is in the checkout that the directory
// is in, or bare. What an earlier one left is removed first; one that is running is
// an error. Progress goes to the log.
func Up(ctx context.Context, directory string, bare bool, log io.Writer) (err error) {
	unlock, err := exclusive()
	if err != nil {
		return err
	}
	defer unlock()
	if os.Geteuid() != 0 {
		return errors.New("it takes root to make namespaces")
	}
	// One whose start was cut off is what an earlier one left.
	if _, err := Open(directory); err == nil {
		return errors.New("a cluster is running already: stop it with make cluster-down")
	}
	c := &Cluster{bare: bare, log: log}
	if c.builder, err = build.New(directory, log); err != nil {
		return err
	}
	binaries, err := c.builder.Binaries(ctx)
	if err != nil {
		return err
	}
	if c.crds, err = c.builder.SnapshotCRDs(ctx); err != nil {
		return err
	}
	manifests, err := c.manifests(ctx, binaries["kubectl"])
	if err != nil {
		return err
	}
	images, err := buildImages(ctx, c.builder, manifests)
	if err != nil {
		return err
	}
	if err := down(ctx, log); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nThe cluster stays as it is, to be looked at: logs are in %s/*/logs; make cluster-down removes it", err, Dir)
		}
	}()
	if c.network, err = chooseNetwork(); err != nil {
		return err
	}
	if err := c.prepare(binaries, images); err != nil {
		return err
	}
	if err := c.builder.Step("starting the control plane", func() error { return c.startControlPlane(ctx) }); err != nil {
		return err
	}
	if err := c.builder.Step("starting the nodes", func() error { return c.startNodes(ctx) }); err != nil {
		return err
	}
	if err := c.builder.Step("starting the snapshot controller", func() error { return c.startSnapshotController(ctx) }); err != nil {
		return err
	}
	if bare {
		return os.WriteFile(completeFile, []byte(bareCluster), 0o644)
	}
	if err := c.install(ctx, images); err != nil {
		return err
	}
	return os.WriteFile(completeFile, nil, 0o644)
}

// A file tells that the cluster's start was completed, and whether it is bare.
var completeFile = filepath.Join(Dir, "complete")

const bareCluster = "bare"

// prepare writes what all of the cluster use.
func (c *Cluster) prepare(binaries map[string]string, images []build.Image) error {
	if err := os.MkdirAll(filepath.Join(Dir, "bin"), 0o755); err != nil {
		return err
	}
	for name, file := range binaries {
		if err := os.Symlink(file, program(name)); err != nil {
			return err
		}
	}
	data, err := json.Marshal(c.network)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(Dir, "network.json"), data, 0o644),
		writeImages(images),
	)
}

// machines gives the machines of the cluster, running or not.
func machines() []machine {
	all := []machine{control}
	for _, n := range (&Cluster{}).Nodes() {
		all = append(all, n.machine)
	}
	return all
}

// startNodes starts all nodes at once.
func (c *Cluster) startNodes(ctx context.Context) error {
	return parallel(c.Nodes(), func(n *Node) error { return n.Start(ctx) })
}

// parallel does something for each at once, and gives all errors.
func parallel[T any](all []T, do func(T) error) error {
	errs := make(chan error)
	for _, one := range all {
		go func() { errs <- do(one) }()
	}
	var err error
	for range all {
		err = errors.Join(err, <-errs)
	}
	return err
}

// Down stops the cluster, and removes all that it made. It is an error if anything
// of it is left.
func Down(ctx context.Context, log io.Writer) error {
	unlock, err := exclusive()
	if err != nil {
		return err
	}
	defer unlock()
	return down(ctx, log)
}

func down(ctx context.Context, log io.Writer) error {
	if leftovers() == nil {
		return nil
	}
	fmt.Fprintln(log, "stopping the cluster…")
	if err := parallel(machines(), func(m machine) error { return m.halt(ctx) }); err != nil {
		return err
	}
	if err := detach(ctx); err != nil {
		return err
	}
	if err := detachLoops(ctx, Dir); err != nil {
		return err
	}
	if err := removeCgroups(ctx); err != nil {
		return err
	}
	if err := removeAll(Dir); err != nil {
		return err
	}
	return leftovers()
}

// leftovers tells what of a cluster is there, as an error.
func leftovers() error {
	var found []string
	for _, m := range machines() {
		pid, err := m.pid()
		if err != nil {
			return err
		}
		if pid != 0 {
			found = append(found, fmt.Sprintf("%s (process %d)", m.name, pid))
		}
	}
	directories, _, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range directories {
		directories[slices.Index(directories, dir)] = filepath.Join(dir, clusterName)
	}
	for _, path := range append(directories, Dir, "/sys/class/net/"+clusterName) {
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, Dir+"/") {
			found = append(found, "mount "+strings.Fields(line)[4])
		}
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, path := range backing {
		if file, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(file), Dir+"/") {
			found = append(found, strings.Split(path, "/")[3])
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("left of the cluster: %s", strings.Join(found, ", "))
	}
	return nil
}

// removeAll removes a directory of the cluster, unless something is mounted in it.
func removeAll(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if point := strings.Fields(line)[4]; point == dir || strings.HasPrefix(point, dir+"/") {
			return fmt.Errorf("%s is mounted, which no cluster does: unmount it, then try again", point)
		}
	}
	return os.RemoveAll(dir)
}

// exclusive makes sure that only one process starts or stops a cluster.
func exclusive() (func(), error) {
	cache, err := os.UserCacheDir() // where a file may stay
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "orlop-e2e")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(dir, clusterName+".up-down.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		return nil, errors.New("the cluster is being started or stopped by another process")
	}
	return func() { file.Close() }, nil
}

func output(cmd *exec.Cmd) (string, error) { return build.Output(cmd) }
