//go:build integration

package crash

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/orlop-csi/orlop/tests/harness"
)

// mutants are drivers with one fault each: in file, which is below pkg, right is
// replaced by wrong. The operation must show it, in words that have want.
var mutants = []struct {
	name, file, right, wrong, operation, want string
}{
	{
		"what was frozen is not thawed at the start", "pool/image/hold.go",
		"if err := e.thaw(volume); err != nil {", "if err := error(nil); err != nil {",
		"CreateSnapshot, of a live volume", "frozen",
	},
	{
		"a pod that was stopped does not go on at the start", "pool/image/hold.go",
		"err = freezer.Thaw()", "_ = freezer",
		"CreateVolumeGroupSnapshot, with a block volume of a pod", "the pod is frozen",
	},
	{
		"what was being made is not removed at the start", "pool/image/recover.go",
		"if err := remove(at); err != nil {", "if err := error(nil); remove == nil && err != nil {",
		"start, after a crash", "not removed",
	},
	{
		"a volume is made among the others", "pool/image/volume.go",
		`path.Join(stagingDir, path.Dir(dir)+"-"+path.Base(dir))`, `path.Join(path.Dir(dir), "new-"+path.Base(dir))`,
		"CreateVolume, empty", "MetadataDamaged",
	},
	{
		"it is not recorded that formatting has begun", "node/stage.go",
		"engine.SetContent(ctx, v.Name, pool.ContentFormatting)", "engine.SetContent(ctx, v.Name, v.Content)",
		"NodeStageVolume, the first, ext4", "it was not formatted",
	},
	{
		"a volume that is attached is attached once more", "pool/image/attach.go",
		"if d.ReadOnly != readOnly {", "if d.ReadOnly != readOnly || true {",
		"NodeStageVolume, block", "too much: device",
	},
}

func TestFaultsOfTheDriverAreCaught(t *testing.T) {
	if os.Getenv("ORLOP_TEST_DRIVER") != "" {
		t.Skip("a driver with a fault has to be built, and here it is given")
	}
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			test := "^" + regexp.QuoteMeta("TestNothingIsLostAndNothingIsLeftWhereverTheDriverIsKilled") + "$/^" +
				regexp.QuoteMeta(strings.ReplaceAll(m.operation, " ", "_")) + "$"
			cmd := exec.Command(os.Args[0], "-test.run", test)
			cmd.Env = append(os.Environ(), "ORLOP_TEST_DRIVER="+harness.Mutate(t, m.file, m.right, m.wrong), "ORLOP_CRASH_EVERY=1", "ORLOP_CRASH_PATIENCE=2s")
			out, err := cmd.CombinedOutput()
			said, _, _ := strings.Cut(string(out), "log of csi-driver:")
			if err == nil || !strings.Contains(said, m.want) {
				t.Errorf("%v; nothing says %q:\n%s", err, m.want, out)
			}
		})
	}
}
