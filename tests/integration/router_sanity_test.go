//go:build integration

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/orlop-csi/orlop/tests/harness"
)

// A router over nodes is the same driver as one node by itself, to the upstream
// suite too. It stages on node-1, where new volumes go because most room is
// there; its lists, capacities and look-ups go through all three.
func TestRouterPassesCSISanity(t *testing.T) {
	suite := filepath.Join(t.TempDir(), "csi-sanity")
	build := exec.Command("go", "build", "-o", suite, "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")
	build.Dir = filepath.Join("..", "sanity") // which has it in its go.mod
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building csi-sanity: %v\n%s", err, out)
	}
	for _, access := range []string{"mount", "block"} {
		t.Run(access, func(t *testing.T) {
			mutable := filepath.Join(t.TempDir(), "mutable.yaml")
			ctlMust(t, os.WriteFile(mutable, []byte("readIOPS: 1k\nwriteBandwidth: 10Mi\n"), 0o600))
			f := harness.StartFleet(t, harness.FilePool("60Gi"), harness.FilePool("1Gi"), harness.FilePool("1Gi"))
			out, err := exec.Command(suite,
				"--csi.endpoint=unix://"+f.Nodes[0].Socket,
				"--csi.controllerendpoint=unix://"+f.Socket,
				"--csi.mountdir="+filepath.Join(f.Dir, "mount"),
				"--csi.stagingdir="+filepath.Join(f.Dir, "stage"),
				"--csi.testvolumesize=1073741824",
				"--csi.testvolumeexpandsize=2147483648",
				"--csi.testvolumeaccesstype="+access,
				"--csi.testvolumemutableparameters="+mutable,
				"--ginkgo.no-color",
			).CombinedOutput()
			passed := regexp.MustCompile(`92 Passed \| 0 Failed`)
			if err != nil || !passed.Match(out) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
