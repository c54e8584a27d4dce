package harness

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Mutate builds a driver with a fault: in file, which is below pkg, right, which
// is there once, is replaced by wrong; so are further pairs. It gives the path of
// the binary.
func Mutate(t testing.TB, file, right, wrong string, more ...string) (binary string) {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../pkg", file)) // from the test's directory
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pairs := append([]string{right, wrong}, more...)
	for i := 0; i < len(pairs); i += 2 {
		if strings.Count(string(text), pairs[i]) != 1 {
			t.Fatalf("%s has not once %q", file, pairs[i])
		}
	}
	dir := t.TempDir()
	binary, mutant, overlay := filepath.Join(dir, "csi-driver"), filepath.Join(dir, "mutant.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(mutant, []byte(strings.NewReplacer(pairs...).Replace(string(text))), 0o600); err != nil {
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
