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
		"what there is of a group is not removed at the start", "pool/image/cuts.go",
		"if err := e.takeBack(path.Join(snapshotsDir, name)); err != nil {", "if err := error(nil); err != nil {",
		"CreateVolumeGroupSnapshot, of live volumes", "snapshots of a group of",
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
			mustBeCaught(t, harness.Mutate(t, m.file, m.right, m.wrong), "TestNothingIsLostAndNothingIsLeftWhereverTheDriverIsKilled/"+m.operation, m.want)
		})
	}
}

// quietMutants are drivers with a fault that no kill shows: it takes a failure of
// the power, or an error of the disk, at some point of the operation.
var quietMutants = []struct {
	name, file, test, want string
	pairs                  []string // right, wrong
}{
	{
		// When the call is answered all is well, and so it is after a kill.
		"metadata takes its place before it is on stable storage", "pool/image/metadata.go",
		"TestNothingIsLostWhereverThePowerFails/xfs/ControllerModifyVolume, in use", "unexpected end of JSON input",
		[]string{
			"	if err := f.Sync(); err != nil {\n		return err\n	}\n	return f.Close()", "	return f.Close()",
			"	return syncDir(root, path.Dir(name))\n}", "	return errors.Join(syncDir(root, path.Dir(name)), syncFile(root, name))\n}\n\nfunc syncFile(root *os.Root, name string) error {\n	f, err := root.Open(name)\n	if err != nil {\n		return err\n	}\n	defer f.Close()\n	return f.Sync()\n}",
		},
	},
	{
		"what was copied is not brought to stable storage", "pool/image/volume.go",
		"TestNothingIsLostWhereverThePowerFails/ext4/CreateSnapshot, by copying", "no filesystem",
		[]string{"	if err := s.data.Sync(); err != nil {\n		return noSpace(err)\n	}\n", ""},
	},
	{
		"what could not be brought to stable storage is answered with OK", "pool/image/volume.go",
		"TestAnErrorAtAnyPointIsToldAndLosesNothing/errors/CreateVolume, empty", "the call is answered with OK",
		[]string{"	return noSpace(s.engine.syncs[path.Dir(s.dir)].do())", "	_ = s.engine.syncs[path.Dir(s.dir)].do()\n	return nil"},
	},
}

func TestFaultsThatNoKillShowsAreCaught(t *testing.T) {
	if os.Getenv("ORLOP_TEST_DRIVER") != "" {
		t.Skip("a driver with a fault has to be built, and here it is given")
	}
	for _, m := range quietMutants {
		t.Run(m.name, func(t *testing.T) {
			mustBeCaught(t, harness.Mutate(t, m.file, m.pairs[0], m.pairs[1], m.pairs[2:]...), m.test, m.want)
		})
	}
}

// mustBeCaught fails the test unless one of these tests fails with a driver, in
// words that have want.
func mustBeCaught(t *testing.T, driver, test, want string) {
	t.Helper()
	var pattern []string
	for part := range strings.SplitSeq(test, "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(strings.ReplaceAll(part, " ", "_"))+"$")
	}
	cmd := exec.Command(os.Args[0], "-test.run", strings.Join(pattern, "/"))
	cmd.Env = append(os.Environ(), "ORLOP_TEST_DRIVER="+driver, "ORLOP_CRASH_EVERY=1", "ORLOP_CRASH_PATIENCE=2s")
	out, err := cmd.CombinedOutput()
	said, _, _ := strings.Cut(string(out), "log of csi-driver:")
	if err == nil || !strings.Contains(said, want) {
		t.Errorf("%v; nothing says %q:\n%s", err, want, out)
	}
}
