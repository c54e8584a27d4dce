//go:build integration

package crash

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// mutants are drivers with one fault each: in file, which is below pkg, right is
// replaced by wrong. The operation must show it, in words that have want.
var mutants = []struct {
	name, file, right, wrong, operation, want string
}{
	{
		"what was frozen is not thawed at the start", "pool/image/recover.go",
		"if err := e.thaw(volume); err != nil {", "if err := error(nil); err != nil {",
		"CreateSnapshot, of a live volume", "frozen",
	},
	{
		"what was being made is not removed at the start", "pool/image/recover.go",
		"if err := remove(at); err != nil {", "if err := error(nil); remove == nil && err != nil {",
		"start, after a crash", "not removed",
	},
	{
		"a volume is made among the others", "pool/image/volume.go",
		`staged := path.Join(stagingDir, path.Dir(dir)+"-"+path.Base(dir))`, `staged := path.Join(path.Dir(dir), "new-"+path.Base(dir))`,
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
			cmd.Env = append(os.Environ(), "ORLOP_TEST_DRIVER="+mutate(t, m.file, m.right, m.wrong), "ORLOP_CRASH_EVERY=1", "ORLOP_CRASH_PATIENCE=2s")
			out, err := cmd.CombinedOutput()
			said, _, _ := strings.Cut(string(out), "log of csi-driver:")
			if err == nil || !strings.Contains(said, m.want) {
				t.Errorf("%v; nothing says %q:\n%s", err, m.want, out)
			}
		})
	}
}

// mutate builds a driver in which one line is wrong.
func mutate(t *testing.T, file, right, wrong string) (binary string) {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../pkg", file))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(text), right) != 1 {
		t.Fatalf("%s has not once %q", file, right)
	}
	dir := t.TempDir()
	binary, mutant, overlay := filepath.Join(dir, "csi-driver"), filepath.Join(dir, "mutant.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(mutant, []byte(strings.Replace(string(text), right, wrong, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {path: mutant}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, replace, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "build", "-overlay", overlay, "-o", binary, "github.com/orlop-csi/orlop/cmd/csi-driver").CombinedOutput()
	if err != nil {
		t.Fatalf("building the mutant: %v\n%s", err, out)
	}
	return binary
}
