package sanity

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// scratch makes a directory for everything that one run makes. At the end of
// the test nothing may be mounted in it and no loop device may be backed by a
// file in it; what is left all the same is reported and taken away.
func scratch(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		mounts, loops := mountsBelow(t, dir), loopsBelow(t, dir)
		// The kernel ends a detach after the last close, which may be that of
		// a device scan in the background.
		for end := time.Now().Add(5 * time.Second); len(loops) > 0 && time.Now().Before(end); loops = loopsBelow(t, dir) {
			time.Sleep(50 * time.Millisecond)
		}
		for _, m := range mounts {
			t.Errorf("left mounted: %s", m)
			command(t, "umount", m)
		}
		for _, l := range loops {
			t.Errorf("left attached: %s", l)
			command(t, "losetup", "--detach", l)
		}
	})
	return dir
}

// mountsBelow lists the mount points in dir, the newest first, so that they can
// be unmounted in that order.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if point := strings.Fields(line)[4]; strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	slices.Reverse(points)
	return points
}

// loopsBelow lists the loop devices whose backing file is in dir.
func loopsBelow(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var devices []string
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if err != nil {
			continue // somebody else's, detached in between
		}
		if strings.HasPrefix(string(backing), dir+"/") {
			devices = append(devices, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devices
}

// fileSource is a pool in one sparse image file.
func fileSource(_ *testing.T, dir string) string {
	return fmt.Sprintf("file: {path: %q, size: 60Gi, sparse: true}", filepath.Join(dir, "pool.img"))
}

// directorySource is a pool in a directory of an ext4 filesystem, which cannot
// share blocks between files.
func directorySource(t *testing.T, dir string) string {
	t.Helper()
	image, mount := filepath.Join(dir, "ext4.img"), filepath.Join(dir, "ext4")
	write(t, image, "")
	if err := os.Truncate(image, 60<<30); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs.ext4", "-q", image)
	command(t, "mount", "-o", "loop", image, mount)
	t.Cleanup(func() { command(t, "umount", mount) })
	return fmt.Sprintf("directory: %q", mount)
}

// start runs the driver with one pool until the test ends, and gives its
// endpoint once it answers.
func start(t *testing.T, dir, driver, source string) (endpoint string) {
	t.Helper()
	config := filepath.Join(dir, "config.yaml")
	write(t, config, "pools:\n- name: default\n  source:\n    "+source+"\n")
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(t.ArtifactDir(), "driver.log"))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "csi.sock")
	cmd := exec.Command(driver, "standalone", "--endpoint=unix://"+socket,
		"--node-id=sanity", "--config="+config, "--state-dir="+state, "--metrics-address=")
	cmd.Stdout, cmd.Stderr = log, log
	// Not to outlive a test that is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		defer log.Close()
		if err := stop(cmd.Process, ended); err != nil {
			t.Errorf("stopping the driver: %v", err)
		}
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("the driver logged:\n%s", text)
		}
	})
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return "unix://" + socket
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the driver ended at once: %v", err)
		default:
		}
	}
	t.Fatal("the driver did not answer within 30 s")
	return ""
}

// stop asks the driver to end, and makes it if it does not.
func stop(driver *os.Process, ended <-chan error) error {
	if err := driver.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("it goes on 30 s after SIGTERM; killed"), driver.Kill(), <-ended)
	}
}

// build compiles one command, in the module that is in a directory.
func build(t *testing.T, module, output, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", output, pkg)
	cmd.Dir = module
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
}

// command runs a command to its end and fails the test if it fails.
func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
