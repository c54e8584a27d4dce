//go:build integration

package chaos

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/tests/harness"
)

// mutants are drivers with one fault each: in file, which is below pkg, right is
// replaced by wrong. Chaos must find it with one of a few seeds, and say something
// that want matches.
var mutants = []struct {
	name, file, right, wrong string
	more                     []string // pairs of right and wrong
	test, want               string
	quick                    bool // it is tried if little time is given, too
}{
	{
		"what was frozen for a snapshot is not thawed", "pool/image/hold.go",
		"if err := o.thaw(); err != nil {", "if err := error(nil); err != nil {",
		nil, "TestOneMachine", `the writer hangs|is frozen`, false,
	},
	{
		"what a crash left frozen is not thawed at the start", "pool/image/hold.go",
		"if err := e.thaw(volume); err != nil {", "if err := error(nil); err != nil {",
		nil, "TestOneMachine", `the writer hangs|is frozen|is mounted or claimed`, false,
	},
	{
		"a restore is of the volume as it is now, not of the snapshot", "pool/image/volume.go",
		"return &origin{path.Join(snapshotsDir, s.Name)", "return &origin{path.Join(volumesDir, path.Base(s.SourceID))",
		nil, "TestOneMachine", `its data: |the source's image|has data on it that the driver did not write|mount (ext4|xfs|btrfs) of`, true,
	},
	{
		"a volume that is unstaged stays attached", "node/stage.go",
		"return &csi.NodeUnstageVolumeResponse{}, detachAll(ctx, engine, name)", "return &csi.NodeUnstageVolumeResponse{}, nil",
		nil, "TestOneMachine", `device v\d+ is "\d+", and must|it is attached to`, false,
	},
	{
		"the room of a snapshot that is deleted is not given back", "pool/image/snapshot.go",
		"e.ledger.give(s.charge, pool.Thin)", "e.ledger.give(s.charge-s.charge, pool.Thin)",
		nil, "TestOneMachine", `bytes are available and \d+ promised`, false,
	},
	{
		"the volumes of a group are cut without being held", "pool/image/cuts.go",
		"if one.writable != nil {", "if one.writable != nil && c.group == nil {",
		[]string{"		one.Created = at\n", "		one.Created = at\n		time.Sleep(time.Duration(one.Size>>20%5) * 100 * time.Millisecond)\n"},
		"TestOneMachine", `that was begun when record`, false,
	},
	{
		"a volume in use is deleted", "pool/image/volume.go",
		"	if err := e.mustBeIdle(name); err != nil {\n		return err\n	}\n	if err := e.discard(", "	if err := e.discard(",
		nil, "TestOneMachine", `it was not refused with FailedPrecondition`, false,
	},
}

// Chaos is brought to a driver with a fault so often, and for so many rounds at
// most.
const (
	seedsToTry  = 5
	roundsToTry = 24
)

func TestFaultsOfTheDriverAreCaught(t *testing.T) {
	if os.Getenv("ORLOP_TEST_DRIVER") != "" {
		t.Skip("a driver with a fault has to be built, and here it is given")
	}
	few := setting(t, "ORLOP_CHAOS_DURATION", 0, time.ParseDuration) == 0
	for _, m := range mutants {
		if few && !m.quick {
			continue // it takes a while to build them all: make chaos does
		}
		t.Run(m.name, func(t *testing.T) {
			binary := harness.Mutate(t, m.file, m.right, m.wrong, m.more...)
			temp, err := os.MkdirTemp("", "chaos-") //nolint:usetesting // a short name, for sockets
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(temp)
			for seed := 1; seed <= seedsToTry; seed++ {
				cmd := exec.Command(os.Args[0], "-test.run", "^"+m.test+"$")
				cmd.Env = append(os.Environ(), "ORLOP_TEST_DRIVER="+binary, "ORLOP_CHAOS_DURATION=", fmt.Sprintf("ORLOP_CHAOS_ROUNDS=%d", roundsToTry), "ORLOP_CHAOS_PATIENCE=4s", fmt.Sprintf("ORLOP_CHAOS_SEED=%d", seed), "TMPDIR="+temp)
				out, err := cmd.CombinedOutput()
				if err == nil {
					continue
				}
				said, _, _ := strings.Cut(string(out), "log of csi-driver:")
				if !regexp.MustCompile(m.want).MatchString(said) {
					t.Errorf("nothing says %q:\n%s", m.want, out)
				}
				t.Logf("seed %d: %s", seed, said)
				return
			}
			t.Errorf("it is not found with %d seeds", seedsToTry)
		})
	}
}
