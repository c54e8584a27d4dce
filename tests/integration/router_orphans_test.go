//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/router"
	"github.com/orlop-csi/orlop/tests/harness"
)

// orphanCommand runs csi-driver orphans against a router.
func orphanCommand(t *testing.T, f *harness.Fleet, args ...string) (out, errOut string, err error) {
	t.Helper()
	cmd := exec.Command(harness.Binary(t), append([]string{"orphans", "--endpoint", "unix://" + f.Socket}, args...)...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

// orphansOf lists what the command tells to be orphans, as kind/ID.
func orphansOf(t *testing.T, f *harness.Fleet) []string {
	t.Helper()
	out, errOut, err := orphanCommand(t, f, "--output", "json")
	if err != nil {
		t.Fatalf("%v: %s", err, errOut)
	}
	var r router.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	orphans := []string{}
	for _, u := range r.Unclaimed {
		if u.Orphan {
			orphans = append(orphans, string(u.Kind)+"/"+u.ID)
		}
	}
	return orphans
}

func TestRouterFindsOrphansAndRemovesThemOnlyWhenTold(t *testing.T) {
	f := threeNodes(t)
	if _, errOut, err := orphanCommand(t, f); err == nil || !strings.Contains(errOut, "--claims-file") {
		t.Errorf("a router that knows no claims: %v, %q", err, errOut)
	}
	block := harness.Block(harness.Writer)
	ids := map[string]string{}
	for name, node := range map[string]string{"wanted": "node-1", "lost": "node-2", "used": "node-3"} {
		ids[name] = f.Create(name, ctlMiB, block, onNode(node)).GetVolumeId()
	}
	snapshot := f.Snapshot("lost-snapshot", ids["wanted"]).GetSnapshotId()
	lost, used, cut := "volume/"+ids["lost"], "volume/"+ids["used"], "snapshot/"+snapshot
	claims := filepath.Join(f.Dir, "claims")
	claim := func(claimed ...string) {
		t.Helper()
		ctlMust(t, os.WriteFile(claims+".new", []byte(strings.Join(claimed, "\n")+"\n"), 0o600))
		ctlMust(t, os.Rename(claims+".new", claims))
	}
	claim(ids["wanted"])
	metrics := ctlServesMetrics(t, f.Driver)
	f.Args = append(f.Args, "--claims-file", claims, "--orphan-grace-period", "1s")
	f.Restart()

	// Claims that are never renewed prove nothing of a volume that was found
	// after they were written.
	if got := orphansOf(t, f); len(got) > 0 {
		t.Errorf("at once: %v", got)
	}
	time.Sleep(1500 * time.Millisecond)
	if got := orphansOf(t, f); len(got) > 0 {
		t.Errorf("with claims from before: %v", got)
	}
	want := []string{lost, cut, used}
	slices.Sort(want)
	soonOrphans := func(what string, want ...string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			claim(ids["wanted"])
			got := orphansOf(t, f)
			slices.Sort(got)
			if slices.Equal(got, want) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %v, want %v", what, got, want)
			}
		}
	}
	soonOrphans("after the grace period", want...)
	values := ctlMetrics(t, metrics)
	for metric, want := range map[string]float64{
		`orlop_orphans{kind="volume",node="node-1"}`: 0, `orlop_orphans{kind="snapshot",node="node-1"}`: 1,
		`orlop_orphans{kind="volume",node="node-2"}`: 1, `orlop_orphans{kind="volume",node="node-3"}`: 1,
	} {
		if got, ok := values[metric]; !ok || got != want {
			t.Errorf("%s is %v (%t), want %v", metric, got, ok, want)
		}
	}
	for _, o := range want {
		_, id, _ := strings.Cut(o, "/")
		if n := strings.Count(f.Log(), fmt.Sprintf("id=%q", id)); n != 1 {
			t.Errorf("%d lines of the log tell of %s", n, o)
		}
	}
	table, _, err := orphanCommand(t, f)
	if err != nil || !strings.Contains(table, lost) || strings.Contains(table, ids["wanted"]+" ") {
		t.Errorf("%v\n%s", err, table)
	}

	// What is claimed, or in use, stays, with its data.
	d := f.Nodes[2]
	target := d.Use("used", ids["used"], block)
	ctlMust(t, os.WriteFile(target, []byte("precious"), 0))
	out, errOut, err := orphanCommand(t, f, "--remove", used)
	if err == nil || out != "" || !strings.Contains(errOut, "node-3") {
		t.Errorf("in use: %v, %q, %q", err, out, errOut)
	}
	claim(ids["wanted"], ids["lost"])
	if out, errOut, err := orphanCommand(t, f, "--remove", lost, "volume/"+ids["wanted"]); err == nil || out != "" || !strings.Contains(errOut, "claimed") {
		t.Errorf("claimed: %v, %q, %q", err, out, errOut)
	}
	for what, args := range map[string][]string{
		"all without confirmation": {"--remove", "--all"}, "nothing named": {"--remove"}, "an ID without kind": {"--remove", ids["lost"]},
		"a name without --remove": {lost},
	} {
		if out, _, err := orphanCommand(t, f, args...); err == nil || out != "" {
			t.Errorf("%s: %v, %q", what, err, out)
		}
	}
	for name, id := range ids {
		if _, err := f.ControllerGetVolume(f.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	data, err := os.ReadFile(target)
	if err != nil || !bytes.HasPrefix(data, []byte("precious")) {
		t.Errorf("the volume in use: %v", err)
	}

	soonOrphans("again", want...)
	if out, errOut, err := orphanCommand(t, f, "--remove", lost); err != nil || out != "removed "+lost+"\n" {
		t.Errorf("%v, %q, %q", err, out, errOut)
	}
	d.Release("used", ids["used"])
	if out, errOut, err := orphanCommand(t, f, "--remove", "--all", "--yes"); err != nil || strings.Count(out, "removed ") != 2 {
		t.Errorf("%v, %q, %q", err, out, errOut)
	}
	if left := ctlIDs(t, f.Driver); !slices.Equal(left, []string{ids["wanted"]}) {
		t.Errorf("what is left: %v", left)
	}
	f.Nodes[1].Stop()
	if out, errOut, err := orphanCommand(t, f); err != nil || !strings.Contains(errOut, "node-2") {
		t.Errorf("a node that does not answer: %v, %q, %q", err, out, errOut)
	}
}

// What a router that died between two nodes left of a group, or a group whose
// objects were deleted with their snapshots retained, can be removed.
func TestRouterRemovesAGroupOfOrphansAsAWhole(t *testing.T) {
	f := threeNodes(t)
	var volumes []string
	for _, n := range f.Nodes[:2] {
		volumes = append(volumes, f.Create("v-"+n.Node, ctlMiB, harness.Block(harness.Writer), onNode(n.Node)).GetVolumeId())
	}
	g, err := groupCreate(f.Driver, "g", volumes...)
	ctlMust(t, err)
	members := groupIDs(g)
	claims := filepath.Join(f.Dir, "claims")
	f.Args = append(f.Args, "--claims-file", claims, "--orphan-grace-period", "1s")
	claimed := volumes
	soon := func(what string, want ...string) {
		t.Helper()
		slices.Sort(want)
		dataEventually(t, func() error {
			ctlMust(t, os.WriteFile(claims+".new", []byte(strings.Join(claimed, "\n")+"\n"), 0o600))
			ctlMust(t, os.Rename(claims+".new", claims))
			got := orphansOf(t, f)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return fmt.Errorf("%s: %v, want %v", what, got, want)
			}
			return nil
		})
	}
	ctlMust(t, os.WriteFile(claims, nil, 0o600))
	f.Restart()
	claimed = append(volumes, members[0])
	soon("one is claimed", "snapshot/"+members[1])
	if out, errOut, err := orphanCommand(t, f, "--remove", "snapshot/"+members[1]); err == nil || out != "" || !strings.Contains(errOut, members[0]) {
		t.Errorf("one of the group is claimed: %v, %q, %q", err, out, errOut)
	}
	claimed = volumes
	soon("none is claimed", "snapshot/"+members[0], "snapshot/"+members[1])
	if out, errOut, err := orphanCommand(t, f, "--remove", "--all", "--yes"); err != nil || strings.Count(out, "removed ") != 2 {
		t.Errorf("%v, %q, %q", err, out, errOut)
	}
	if left := groupSnapshots(t, f.Driver); len(left) > 0 {
		t.Errorf("what is left: %v", left)
	}
}
