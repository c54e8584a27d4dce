// Package harness runs the real csi-driver for tests and benchmarks: it builds
// the binary, starts it on pools in temporary directories, speaks CSI to it
// over its socket, and leaves nothing behind, also when a test fails.
//
// It needs root, loop devices, and the mkfs tools of ext4, XFS and btrfs. Where
// there is no Go, the environment variable ORLOP_TEST_DRIVER names a binary to
// use instead of building one.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
)

// Race tells whether the tests, and the driver that they build, have the race
// detector.
const Race = raceEnabled

// NodeID is the name of the node that drivers run as.
const NodeID = "node-1"

// Driver is one csi-driver process and a client of it. Its directories outlive
// Stop and Kill, so that Start can be called again.
type Driver struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.SnapshotMetadataClient
	csi.GroupControllerClient
	csi.NodeClient

	Dir    string // everything of this driver is in it
	Config string // path of the configuration file
	Socket string
	Args   []string // more arguments
	Env    []string // more of the environment, as "NAME=value"
	Mode   string   // the driver's command; standalone unless changed
	Node   string   // its name; NodeID unless changed
	Binary string   // csi-driver

	t       testing.TB
	base    []string // arguments that a test does not see
	router  *Driver  // in front of it; nil if it stands alone
	process *exec.Cmd
	log     *lockedBuffer
	conn    *grpc.ClientConn
}

// prebuilt is the csi-driver to use, or empty to build one.
var prebuilt = os.Getenv("ORLOP_TEST_DRIVER")

// built is the directory of the csi-driver that was built, if one was.
var built string

var build = sync.OnceValues(func() (string, error) {
	if prebuilt != "" {
		return prebuilt, nil
	}
	var err error
	if built, err = os.MkdirTemp("", "orlop-harness-"); err != nil {
		return "", err
	}
	binary := filepath.Join(built, "csi-driver")
	args := []string{"build", "-o", binary}
	if raceEnabled {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "github.com/orlop-csi/orlop/cmd/csi-driver")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building csi-driver: %w\n%s", err, out)
	}
	return binary, nil
})

// Main runs the tests of a package and removes the binary that they built.
//
// The binary is also what runs a [Load].
func Main(m *testing.M) {
	if arguments := os.Getenv(loadVariable); arguments != "" {
		if err := runLoad(arguments); err != nil {
			fmt.Fprintln(os.Stderr, "load:", err)
			os.Exit(1)
		}
	}
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

// Binary builds csi-driver unless it is prebuilt, with the race detector if the
// test has it, and gives its path.
func Binary(t testing.TB) string {
	t.Helper()
	binary, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// New prepares a driver with the configuration, in which $DIR stands for the
// driver's own directory. At the test's end the driver is stopped and every
// mount and loop device below the directory is undone. In a test that is
// [BehindRouter] it is a node with a router in front of it.
func New(t testing.TB, config string) *Driver {
	t.Helper()
	d := prepare(t, config)
	if f := fleetOf(t); f != nil {
		f.take(d)
	}
	return d
}

func prepare(t testing.TB, config string) *Driver {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return NewIn(t, dir, config)
}

// NewIn is New with everything of the driver in a directory that is there, and
// empty; it has no symbolic links in its path. There is never a router.
func NewIn(t testing.TB, dir, config string) *Driver {
	t.Helper()
	d := &Driver{
		Dir:    dir,
		Config: filepath.Join(dir, "config.yaml"),
		Socket: filepath.Join(dir, "csi.sock"),
		Mode:   "standalone",
		Node:   NodeID,
		t:      t,
		Binary: Binary(t),
		log:    &lockedBuffer{},
	}
	for _, sub := range []string{"state", "staging", "targets"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	d.Configure(config)
	t.Cleanup(func() {
		d.Stop()
		Clean(t, dir)
		if log := d.Log(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "\"Panic\"") {
			t.Error("csi-driver has a race or a panic in its log")
		}
		if t.Failed() {
			t.Logf("log of csi-driver:\n%s", d.Log())
		}
	})
	return d
}

// FilePool is the configuration of a pool in a sparse image file of that size,
// such as "20Gi".
func FilePool(size string) string {
	return fmt.Sprintf("pools:\n- name: default\n  source:\n    file: {path: \"$DIR/default.img\", size: %s, sparse: true}\n", size)
}

// DirectoryPool is the configuration of a pool in a directory.
func DirectoryPool(dir string) string {
	return fmt.Sprintf("pools:\n- name: default\n  source:\n    directory: %s\n", dir)
}

// Start prepares and starts a driver.
func Start(t testing.TB, config string) *Driver {
	t.Helper()
	d := New(t, config)
	d.Start()
	return d
}

// Configure writes the configuration, for the next start.
func (d *Driver) Configure(config string) {
	d.t.Helper()
	if err := os.WriteFile(d.Config, []byte(strings.ReplaceAll(config, "$DIR", d.Dir)), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// Command is the driver's command, not started.
func (d *Driver) Command() *exec.Cmd {
	args := []string{d.Mode, "--endpoint", "unix://" + d.Socket, "--metrics-address", "", "-v", "4"}
	if d.Mode != "controller" {
		args = append(args, "--node-id", d.Node, "--config", d.Config, "--state-dir", filepath.Join(d.Dir, "state"))
	}
	args = append(append(args, d.base...), d.Args...)
	cmd := exec.Command(d.Binary, args...)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	// The race detector lets a process linger for a second when it ends.
	cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0"), d.Env...)
	return cmd
}

// Start starts the process and waits until it serves.
func (d *Driver) Start() {
	d.t.Helper()
	d.Launch((*exec.Cmd).Start)
	if err := d.Serves(); err != nil {
		d.t.Fatal(err)
	}
}

// Launch starts the process with start, and waits for nothing.
func (d *Driver) Launch(start func(*exec.Cmd) error) {
	d.t.Helper()
	d.process = d.Command()
	if err := start(d.process); err != nil {
		d.t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+d.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		d.t.Fatal(err)
	}
	d.conn = conn
	d.GroupControllerClient = csi.NewGroupControllerClient(conn)
	d.IdentityClient, d.ControllerClient, d.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	d.SnapshotMetadataClient = csi.NewSnapshotMetadataClient(conn)
	if d.router != nil {
		if d.router.process == nil {
			d.router.Start()
		}
		d.ControllerClient, d.SnapshotMetadataClient = d.router.ControllerClient, d.router.SnapshotMetadataClient
		d.GroupControllerClient = d.router.GroupControllerClient
	}
}

// Serves waits until a process that was launched serves.
func (d *Driver) Serves() error {
	deadline := time.Now().Add(time.Minute)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		probe, err := d.Probe(ctx, &csi.ProbeRequest{})
		cancel()
		if err == nil && probe.GetReady().GetValue() {
			return d.reached()
		}
		if d.process.Process.Signal(syscall.Signal(0)) != nil || time.Now().After(deadline) || exited(d.process) {
			return fmt.Errorf("csi-driver does not serve: %w\n%s", err, d.Log())
		}
		d.conn.ResetConnectBackoff()
		time.Sleep(5 * time.Millisecond)
	}
}

// exited reports whether a process that nobody has waited for is a zombie.
func exited(cmd *exec.Cmd) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		return true
	}
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	return strings.HasPrefix(string(rest), " Z")
}

// Stop ends the process as the system does, and waits for it.
func (d *Driver) Stop() { d.end(syscall.SIGTERM) }

// Kill ends the process as a crash does.
func (d *Driver) Kill() { d.end(syscall.SIGKILL) }

// Restart stops the process and starts it again.
func (d *Driver) Restart() {
	d.t.Helper()
	d.Stop()
	d.Start()
}

func (d *Driver) end(signal syscall.Signal) {
	if d.process == nil {
		return
	}
	_ = d.process.Process.Signal(signal)
	_ = d.process.Wait()
	d.process = nil
	d.conn.Close()
}

// Pid is the process ID of the running driver.
func (d *Driver) Pid() int { return d.process.Process.Pid }

// Log is what the driver has written so far, of all its starts.
func (d *Driver) Log() string { return d.log.String() }

// Staging and Target give paths that an orchestrator would choose. The staging
// path is made, as an orchestrator does; the target path is not.
func (d *Driver) Staging(name string) string {
	path := filepath.Join(d.Dir, "staging", name)
	if err := os.MkdirAll(path, 0o750); err != nil {
		d.t.Fatal(err)
	}
	return path
}

// Target gives a path to publish at.
func (d *Driver) Target(name string) string { return filepath.Join(d.Dir, "targets", name) }

// Clean undoes every mount at or below a directory, and detaches every loop
// device whose backing file is below it.
func Clean(t testing.TB, dir string) {
	t.Helper()
	limit := 30 * time.Second
	if _, benchmark := t.(*testing.B); benchmark {
		limit = 5 * time.Minute // XFS frees gigabytes in small pieces when it is unmounted
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for try := range 200 { // what is mounted over, and images in pools on images
		if try > 10 { // the kernel is still at it
			time.Sleep(50 * time.Millisecond)
		}
		left := false
		mounts, err := filesystem.Mounts()
		if err != nil {
			t.Error(err)
			return
		}
		for _, mount := range slices.Backward(mounts) {
			if p := mount.Path; p == dir || strings.HasPrefix(p, dir+"/") {
				left = true
				if frozen, err := filesystem.Thaw(p); err == nil && frozen {
					t.Logf("%s was frozen", p)
				}
				if err := filesystem.Unmount(ctx, p); err != nil {
					t.Logf("unmounting %s: %v", p, err)
				}
			}
		}
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			t.Error(err)
			return
		}
		for _, file := range files {
			backing, err := os.ReadFile(file)
			if err != nil || !strings.HasPrefix(string(backing), dir+"/") {
				continue
			}
			left = true
			node := filepath.Base(filepath.Dir(filepath.Dir(file)))
			if err := detach(ctx, "/dev/"+node); err != nil {
				t.Logf("detaching %s: %v", node, err)
			}
		}
		if !left {
			return
		}
	}
	t.Errorf("mounts or loop devices below %s could not be undone", dir)
}

func detach(ctx context.Context, path string) error {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return err
	}
	device, err := loop.Get(st.Rdev)
	if errors.Is(err, loop.ErrUnasked) { // on a filesystem that a test has shut down
		node, err := os.Open(path)
		if err != nil {
			return err
		}
		defer node.Close()
		return unix.IoctlSetInt(int(node.Fd()), unix.LOOP_CLR_FD, 0)
	}
	if err != nil {
		return err
	}
	if mounts, _, err := filesystem.UsesOf(device.Number); err != nil || len(mounts) > 0 {
		return err // a pool's: its volumes go first, it goes the next time round
	}
	return device.Detach(ctx)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
