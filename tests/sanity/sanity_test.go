// Package sanity runs csi-sanity, the conformance suite of the CSI project, as
// a separate program against `csi-driver standalone`, once for every kind of
// pool and volume.
//
// It needs root. Everything it makes is below the test's temporary directory,
// and a run that leaves a mount or a loop device there fails.
package sanity

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The sizes in bytes of the volumes that the suite makes; large enough for every
// filesystem (XFS needs 300 MB).
const (
	volumeSize   = 1 << 30
	expandedSize = 2 << 30
)

// leastPassed is how many of the suite's 103 specs pass when every one that a
// claimed capability allows has run: all but the 10 that need a capability which
// is not claimed, and one that the suite itself has switched off.
const leastPassed = 92

// The capabilities that the driver does not claim, and why.
const (
	noPublish = "PUBLISH_UNPUBLISH_VOLUME is not claimed: a local volume has no attach step"
	pending   = "the suite itself has it switched off"
)

// skips are the only reasons that the suite may have for skipping a spec, in
// its words.
var skips = map[string]string{
	"ControllerPublishVolume not supported":             noPublish,
	"ControllerUnpublishVolume not supported":           noPublish,
	"Controller Publish, UnpublishVolume not supported": noPublish,
	"pending": pending,
}

// A pool makes the source of a pool below dir, as the configuration has it.
type pool struct {
	name   string
	source func(t *testing.T, dir string) string
}

var (
	file      = pool{"file", fileSource}
	directory = pool{"directory", directorySource}
)

// TestSanity shows that the driver conforms to the CSI specification as far as
// the upstream suite can tell, whatever holds the volumes and whatever is in
// them.
func TestSanity(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes loop devices and mounts")
	}
	bin := t.TempDir()
	driver := filepath.Join(bin, "csi-driver")
	build(t, "../..", driver, "./cmd/csi-driver")
	suite := filepath.Join(bin, "csi-sanity")
	build(t, ".", suite, "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")

	var results []result
	for _, c := range []struct {
		pool   pool
		volume string
	}{
		{file, "ext4"},
		{file, "xfs"},
		{file, "btrfs"},
		{file, "block"},
		{directory, "ext4"},
		{directory, "block"},
	} {
		t.Run(c.pool.name+"/"+c.volume, func(t *testing.T) {
			dir := scratch(t)
			endpoint := start(t, dir, driver, c.pool.source(t, dir))
			begin := time.Now()
			specs, output := runSuite(t, dir, suite, endpoint, c.volume)
			r := result{pool: c.pool.name, volume: c.volume, specs: specs, took: time.Since(begin)}
			results = append(results, r)
			judge(t, r, output)
		})
	}
	printTable(os.Stdout, results)
}

// judge fails the test unless every spec passed that could, and every skipped
// one has a reason that is expected.
func judge(t *testing.T, r result, output []byte) {
	t.Helper()
	for _, s := range r.specs {
		switch {
		case s.outcome() == failed:
			t.Errorf("failed: %s", s.Name)
		case s.outcome() == skipped && skips[s.reason()] == "":
			t.Errorf("skipped without need: %s: %q", s.Name, s.reason())
		}
	}
	if n := r.count(passed); n < leastPassed {
		t.Errorf("%d specs passed, at least %d should", n, leastPassed)
	}
	if t.Failed() {
		t.Logf("csi-sanity printed:\n%s", output)
	}
}

// runSuite runs csi-sanity on volumes of one kind: "block", or a filesystem.
func runSuite(t *testing.T, dir, suite, endpoint, volume string) (specs []spec, output []byte) {
	t.Helper()
	junit := filepath.Join(t.ArtifactDir(), "junit.xml")
	args := []string{
		"--csi.endpoint=" + endpoint,
		"--csi.mountdir=" + filepath.Join(dir, "mount"),
		"--csi.stagingdir=" + filepath.Join(dir, "staging"),
		fmt.Sprintf("--csi.testvolumesize=%d", volumeSize),
		fmt.Sprintf("--csi.testvolumeexpandsize=%d", expandedSize),
		"--ginkgo.junit-report=" + junit,
		"--ginkgo.no-color",
	}
	mutable := filepath.Join(dir, "mutable.yaml")
	write(t, mutable, "readIOPS: 1k\nwriteBandwidth: 10Mi\n")
	args = append(args, "--csi.testvolumemutableparameters="+mutable)
	if volume == "block" {
		args = append(args, "--csi.testvolumeaccesstype=block")
	} else {
		parameters := filepath.Join(dir, "parameters.yaml")
		write(t, parameters, "csi.storage.k8s.io/fstype: "+volume+"\n")
		args = append(args, "--csi.testvolumeaccesstype=mount", "--csi.testvolumeparameters="+parameters)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), suite, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
	// Its exit status says no more than the report does, once there is one.
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatalf("running csi-sanity: %v", err)
	}
	specs, err := readReport(junit)
	if err != nil {
		t.Fatalf("csi-sanity left no report: %v; it printed:\n%s", err, out.Bytes())
	}
	return specs, out.Bytes()
}
