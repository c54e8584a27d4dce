//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// nodeVolume is a volume and the requests that would stage and publish it.
type nodeVolume struct {
	*harness.Driver

	id, name string
	kind     dataKind
}

func nodeCreate(d *harness.Driver, name string, kind dataKind) nodeVolume {
	return nodeVolume{d, d.Create(name, kind.size, kind.capability).GetVolumeId(), name, kind}
}

func (v nodeVolume) stageRequest() *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.Staging(v.name), VolumeCapability: v.kind.capability,
	}
}

func (v nodeVolume) stage(change ...func(*csi.NodeStageVolumeRequest)) error {
	r := v.stageRequest()
	for _, c := range change {
		c(r)
	}
	_, err := v.NodeStageVolume(v.Context(), r)
	return err
}

func (v nodeVolume) publish(change ...func(*csi.NodePublishVolumeRequest)) error {
	r := &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.Staging(v.name), TargetPath: v.Target(v.name), VolumeCapability: v.kind.capability,
	}
	for _, c := range change {
		c(r)
	}
	_, err := v.NodePublishVolume(v.Context(), r)
	return err
}

func (v nodeVolume) unpublish(target string) error {
	_, err := v.NodeUnpublishVolume(v.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: target})
	return err
}

func (v nodeVolume) unstage() error {
	_, err := v.NodeUnstageVolume(v.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.Staging(v.name)})
	return err
}

func (v nodeVolume) remove() error {
	_, err := v.DeleteVolume(v.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

var (
	nodeExt4  = dataKinds[0]
	nodeBlock = dataKinds[3]
)

func TestNodeStageRefuses(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	type request = csi.NodeStageVolumeRequest
	foreign := filepath.Join(d.Dir, "staging", "foreign")
	dataMust(t, os.Mkdir(foreign, 0o700))
	dataMust(t, unix.Mount("tmpfs", foreign, "tmpfs", 0, "size=1m"))
	link := filepath.Join(d.Dir, "staging", "link")
	dataMust(t, os.Symlink(t.TempDir(), link))
	for _, c := range []struct {
		rule   string
		kind   dataKind
		change func(*request)
		code   codes.Code
		words  []string
	}{
		{"no volume ID", nodeExt4, func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, []string{"volume_id"}},
		{"no staging path", nodeExt4, func(r *request) { r.StagingTargetPath = "" }, codes.InvalidArgument, []string{"staging_target_path"}},
		{"no capability", nodeExt4, func(r *request) { r.VolumeCapability = nil }, codes.InvalidArgument, []string{"volume_capability"}},
		{"an unknown volume", nodeExt4, func(r *request) { r.VolumeId += "-not" }, codes.NotFound, nil},
		{"an ID that is none", nodeExt4, func(r *request) { r.VolumeId = "../../etc" }, codes.NotFound, nil},
		{"a relative staging path", nodeExt4, func(r *request) { r.StagingTargetPath = "staging" }, codes.InvalidArgument, []string{"absolute"}},
		{"a staging path with ..", nodeExt4, func(r *request) { r.StagingTargetPath += "/../x" }, codes.InvalidArgument, []string{".."}},
		{"a staging path that is a link", nodeExt4, func(r *request) { r.StagingTargetPath = link }, codes.InvalidArgument, []string{"link"}},
		{"a staging path with something else on it", nodeExt4, func(r *request) { r.StagingTargetPath = foreign }, codes.AlreadyExists, []string{"something else", "tmpfs"}},
		{"block access to a filesystem volume", nodeExt4, func(r *request) { r.VolumeCapability = harness.Block(harness.Writer) }, codes.FailedPrecondition, []string{"filesystem", "block"}},
		{"filesystem access to a block volume", nodeBlock, func(r *request) { r.VolumeCapability = nodeExt4.capability }, codes.FailedPrecondition, []string{"filesystem", "block"}},
		{"another filesystem", nodeExt4, func(r *request) { r.VolumeCapability = dataKinds[1].capability }, codes.FailedPrecondition, []string{"ext4", "xfs"}},
		{"a filesystem that nobody knows", nodeExt4, func(r *request) { r.VolumeCapability = harness.Mount("vfat", harness.Writer) }, codes.FailedPrecondition, []string{"vfat"}},
		{"many nodes", nodeExt4, func(r *request) {
			r.VolumeCapability = harness.Mount("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)
		}, codes.FailedPrecondition, []string{"node"}},
		{"a mount flag that the kernel does not know", nodeExt4, func(r *request) {
			r.VolumeCapability = harness.Mount("ext4", harness.Writer, "nosuchflag")
		}, codes.InvalidArgument, []string{"mount_flags", "nosuchflag", "Unknown parameter"}},
		{"a mount flag with a bad value", nodeExt4, func(r *request) {
			r.VolumeCapability = harness.Mount("ext4", harness.Writer, "commit=never")
		}, codes.InvalidArgument, []string{"mount_flags", "commit"}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			v := nodeCreate(d.In(t), strings.ReplaceAll(c.rule, " ", "-"), c.kind)
			for range 2 { // the answer to a retry is the same
				dataCode(t, v.stage(c.change), c.code, c.words...)
			}
			dataMust(t, v.remove()) // nothing is left that holds it
		})
	}
	if loops := dataLoops(t, dataPool(d)); len(loops) > 0 {
		t.Errorf("left attached: %v", loops)
	}
	if mounts := dataMounts(t, filepath.Join(d.Dir, "staging")); len(mounts) != 1 {
		t.Errorf("mounted: %v; there should be the one that is not ours", mounts)
	}
}

func TestNodeStageOfAStagedVolume(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	v := nodeCreate(d, "volume", nodeExt4)
	dataMust(t, v.stage())
	flags := func(flags ...string) func(*csi.NodeStageVolumeRequest) {
		return func(r *csi.NodeStageVolumeRequest) {
			r.VolumeCapability = harness.Mount("ext4", harness.Writer, flags...)
		}
	}
	dataMust(t, v.stage())
	dataCode(t, v.stage(flags("ro")), codes.AlreadyExists)
	dataCode(t, v.stage(func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = d.Staging("elsewhere") }),
		codes.FailedPrecondition, "mounted elsewhere", d.Staging("volume"))
	dataMust(t, v.unstage())
	dataMust(t, v.stage(flags("ro")))
	dataMust(t, v.stage(flags("ro")))
	dataCode(t, v.stage(flags("ro", "rw")), codes.AlreadyExists)
	if err := os.Mkdir(filepath.Join(d.Staging("volume"), "x"), 0o700); !errors.Is(err, unix.EROFS) {
		t.Errorf("staged read-only, mkdir gives %v", err)
	}
	dataMust(t, v.unstage())
	dataMust(t, v.unstage())
	dataMustBeIdle(t, d, dataPool(d))
}

func TestNodePublishRefuses(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	type request = csi.NodePublishVolumeRequest
	foreign, file, link := d.Target("foreign"), d.Target("file"), d.Target("link")
	dataMust(t, os.Mkdir(foreign, 0o700))
	dataMust(t, unix.Mount("tmpfs", foreign, "tmpfs", 0, "size=1m"))
	dataMust(t, os.WriteFile(filepath.Join(foreign, "theirs"), nil, 0o600))
	dataMust(t, os.WriteFile(file, []byte("theirs"), 0o600))
	dataMust(t, os.Symlink(t.TempDir(), link))
	for _, kind := range []dataKind{nodeExt4, nodeBlock} {
		v := nodeCreate(d, kind.name, kind)
		dataCode(t, v.publish(), codes.FailedPrecondition, "not staged")
		dataMust(t, v.stage())
		other := map[string]dataKind{"ext4": nodeBlock, "block": nodeExt4}[kind.name].capability
		unfit := map[string]string{"ext4": file, "block": d.Dir}[kind.name]
		for _, c := range []struct {
			rule   string
			change func(*request)
			code   codes.Code
			words  []string
		}{
			{"no volume ID", func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, []string{"volume_id"}},
			{"no target path", func(r *request) { r.TargetPath = "" }, codes.InvalidArgument, []string{"target_path"}},
			{"no capability", func(r *request) { r.VolumeCapability = nil }, codes.InvalidArgument, []string{"volume_capability"}},
			{"no staging path", func(r *request) { r.StagingTargetPath = "" }, codes.FailedPrecondition, []string{"staging_target_path"}},
			{"an unknown volume", func(r *request) { r.VolumeId += "-not" }, codes.NotFound, nil},
			{"a relative target", func(r *request) { r.TargetPath = "targets/x" }, codes.InvalidArgument, []string{"absolute"}},
			{"a target with ..", func(r *request) { r.TargetPath += "/../x" }, codes.InvalidArgument, []string{".."}},
			{"a target that is a link", func(r *request) { r.TargetPath = link }, codes.InvalidArgument, []string{"link"}},
			{"the root directory", func(r *request) { r.TargetPath = "//." }, codes.InvalidArgument, []string{"root"}},
			{"a target without a parent", func(r *request) { r.TargetPath = d.Target("no/such/place") }, codes.FailedPrecondition, []string{"no such file"}},
			{"a target with something else on it", func(r *request) { r.TargetPath = foreign }, codes.AlreadyExists, []string{"something else"}},
			{"a target of the wrong kind", func(r *request) { r.TargetPath = unfit }, codes.AlreadyExists, nil},
			{"the other access type", func(r *request) { r.VolumeCapability = other }, codes.FailedPrecondition, []string{"filesystem", "block"}},
			{"many nodes", func(r *request) {
				r.VolumeCapability = harness.Block(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY)
			}, codes.FailedPrecondition, []string{"node"}},
		} {
			t.Run(kind.name+"/"+c.rule, func(t *testing.T) {
				v := v
				v.Driver = d.In(t)
				dataCode(t, v.publish(c.change), c.code, c.words...)
			})
		}
		dataMust(t, v.unstage()) // nobody holds it
		dataMust(t, v.remove())
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "theirs" {
		t.Errorf("a file that is not ours has %q (%v)", content, err)
	}
	if _, err := os.Lstat(filepath.Join(foreign, "theirs")); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(d.Target(""))
	dataMust(t, err)
	if len(entries) != 3 {
		t.Errorf("targets were left: %v", entries)
	}
}

// A single writer is one publication, of whatever kind; several may be on one
// node only where the mode says so.
func TestNodePublishCountsWriters(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	second := func(r *csi.NodePublishVolumeRequest) { r.TargetPath += "-second" }
	for _, mode := range []harness.Mode{
		csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
	} {
		for _, kind := range []dataKind{nodeExt4, nodeBlock} {
			t.Run(fmt.Sprintf("%s/%s", mode, kind.name), func(t *testing.T) {
				kind.capability = map[string]*csi.VolumeCapability{"ext4": harness.Mount("ext4", mode), "block": harness.Block(mode)}[kind.name]
				v := nodeCreate(d.In(t), strings.ToLower(mode.String())+kind.name, kind)
				dataMust(t, v.stage())
				dataMust(t, v.publish())
				dataMust(t, v.publish())
				err := v.publish(second)
				if mode == harness.Writer {
					dataMust(t, err)
					dataMust(t, v.unpublish(d.Target(v.name+"-second")))
				} else {
					dataCode(t, err, codes.FailedPrecondition, "single writer", d.Target(v.name))
					if _, err := os.Lstat(d.Target(v.name + "-second")); !os.IsNotExist(err) {
						t.Errorf("what was refused has left its target (%v)", err)
					}
				}
				dataMust(t, v.unpublish(d.Target(v.name)))
				dataMust(t, v.publish(second)) // it may move
				dataMust(t, v.unpublish(d.Target(v.name+"-second")))
				dataMust(t, v.unstage())
			})
		}
	}
}

func TestNodePublishAtTheSameTargetWithAnotherReadonlyIsRefused(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	readonly := func(r *csi.NodePublishVolumeRequest) { r.Readonly = true }
	for _, kind := range []dataKind{nodeExt4, nodeBlock} {
		v := nodeCreate(d, kind.name, kind)
		dataMust(t, v.stage())
		dataMust(t, v.publish())
		dataCode(t, v.publish(readonly), codes.AlreadyExists, "readonly")
		dataMust(t, os.WriteFile(kind.file(d.Target(v.name)), []byte("x"), 0o600))
		dataMust(t, v.unpublish(d.Target(v.name)))
		dataMust(t, v.publish(readonly))
		dataMust(t, v.publish(readonly))
		dataCode(t, v.publish(), codes.AlreadyExists, "readonly")
		d.Release(v.name, v.id)
	}
	dataMustBeIdle(t, d, dataPool(d))
}

// Each call says whether it is done already, and the second time changes
// nothing.
func TestNodeCallsCanBeRepeated(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			v := nodeCreate(d.In(t), kind.name, kind)
			var mounts, loops int
			for _, step := range []struct {
				name          string
				do            func() error
				mounts, loops int // more than before
			}{
				{"unpublish what never was published", func() error { return v.unpublish(d.Target(v.name)) }, 0, 0},
				{"unstage what never was staged", v.unstage, 0, 0},
				{"stage", func() error { return v.stage() }, map[bool]int{true: 0, false: 1}[kind.isBlock()], 1},
				{"publish", func() error { return v.publish() }, 1, 0},
				{"unpublish", func() error { return v.unpublish(d.Target(v.name)) }, -1, 0},
				{"unstage", v.unstage, map[bool]int{true: 0, false: -1}[kind.isBlock()], -1},
				{"delete", v.remove, 0, 0},
			} {
				mounts, loops = mounts+step.mounts, loops+step.loops
				for range 3 {
					if err := step.do(); err != nil {
						t.Fatalf("%s: %v", step.name, err)
					}
					if n := len(dataMounts(t, d.Dir)) - 1; n != mounts {
						t.Fatalf("after %s: %d mounts, want %d", step.name, n, mounts)
					}
					if n := len(dataLoops(t, dataPool(d))); n != loops {
						t.Fatalf("after %s: %d loop devices, want %d", step.name, n, loops)
					}
				}
			}
			if _, err := os.Lstat(d.Target(v.name)); !os.IsNotExist(err) {
				t.Errorf("the target path is still there (%v)", err)
			}
		})
	}
}

// Everything takes away only what it has put there.
func TestNodeUnpublishLeavesAloneWhatIsNotItsOwn(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	v := nodeCreate(d, "volume", nodeExt4)
	dataMust(t, v.stage())
	target := d.Target("volume")

	dataMust(t, os.Mkdir(target, 0o700))
	theirs := filepath.Join(target, "theirs")
	dataMust(t, os.WriteFile(theirs, []byte("theirs"), 0o600))
	dataCode(t, v.unpublish(target), codes.FailedPrecondition, "left alone", target)
	if content, err := os.ReadFile(theirs); string(content) != "theirs" {
		t.Fatalf("a foreign file is gone: %v", err)
	}
	dataMust(t, os.Remove(theirs))

	dataMust(t, unix.Mount("tmpfs", target, "tmpfs", 0, "size=1m"))
	dataMust(t, os.WriteFile(theirs, []byte("theirs"), 0o600))
	dataCode(t, v.unpublish(target), codes.FailedPrecondition, target)
	other := v
	other.id += "-not"
	dataCode(t, other.unpublish(target), codes.NotFound)
	if content, err := os.ReadFile(theirs); string(content) != "theirs" {
		t.Fatalf("a foreign mount is gone: %v", err)
	}
	dataMust(t, unix.Unmount(target, 0))
	dataMust(t, v.unpublish(target))
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("an empty target is left (%v)", err)
	}

	dataMust(t, os.WriteFile(target, []byte("theirs"), 0o600))
	dataCode(t, v.unpublish(target), codes.FailedPrecondition, "left alone")
	dataMust(t, os.Remove(target))
	outside := t.TempDir()
	dataMust(t, os.Symlink(outside, target))
	dataCode(t, v.unpublish(target), codes.InvalidArgument, "link")
	if _, err := os.Lstat(outside); err != nil {
		t.Error(err)
	}
	dataMust(t, os.Remove(target))

	// Another volume at that target is not this one's.
	second := nodeCreate(d, "second", nodeExt4)
	dataMust(t, second.stage())
	dataMust(t, second.publish())
	sum := dataFill(t, filepath.Join(d.Target("second"), "file"), 4096)
	dataCode(t, v.unpublish(d.Target("second")), codes.FailedPrecondition)
	dataMustHold(t, filepath.Join(d.Target("second"), "file"), 4096, sum)
	d.Release("second", second.id)
	dataMust(t, v.unstage())
}

// What is staged or published can neither be unstaged from under its user nor
// be deleted, and the attempt alters nothing.
func TestNodeVolumesInUseAreNotTakenAway(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			v := nodeCreate(d.In(t), kind.name, kind)
			dataMust(t, v.stage())
			dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
			dataMust(t, v.publish())
			file := kind.file(d.Target(v.name))
			sum := dataFill(t, file, 4*dataMiB)
			mounts, loops := dataMounts(t, d.Dir), dataLoops(t, dataPool(d))

			dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
			dataCode(t, v.unstage(), codes.FailedPrecondition, "published", d.Target(v.name))
			wrong := v
			wrong.name = "another-path"
			dataCode(t, wrong.unstage(), codes.FailedPrecondition)

			if now := dataMounts(t, d.Dir); strings.Join(now, " ") != strings.Join(mounts, " ") {
				t.Errorf("mounts are %v, were %v", now, mounts)
			}
			if now := dataLoops(t, dataPool(d)); strings.Join(now, " ") != strings.Join(loops, " ") {
				t.Errorf("loop devices are %v, were %v", now, loops)
			}
			dataMustHold(t, file, 4*dataMiB, sum)
			dataFill(t, file, dataMiB)
			dataMust(t, v.unpublish(d.Target(v.name)))
			dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
			dataMust(t, v.unstage())
			dataMust(t, v.remove())
		})
	}
}

// A process that has a file open keeps the volume, whatever the orchestrator
// believes. It is told so, and the call succeeds once the file is closed.
func TestNodeVolumesHeldByAProcessAreNotTakenAway(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	for _, kind := range dataKinds {
		t.Run(kind.name, func(t *testing.T) {
			v := nodeCreate(d.In(t), kind.name, kind)
			dataMust(t, v.stage())
			dataMust(t, v.publish())
			file := kind.file(d.Target(v.name))
			release := nodeHold(t, file)
			dataCode(t, v.unpublish(d.Target(v.name)), codes.FailedPrecondition, "busy", d.Target(v.name))
			dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
			release()
			dataMust(t, v.unpublish(d.Target(v.name)))

			held := filepath.Join(d.Staging(v.name), "file")
			says := "busy"
			if kind.isBlock() {
				held, says = "/dev/"+dataLoops(t, dataPool(d))[0], "open in another process"
			}
			release = nodeHold(t, held)
			dataCode(t, v.unstage(), codes.FailedPrecondition, says)
			dataCode(t, v.remove(), codes.FailedPrecondition, "in use")
			release()
			dataMust(t, v.unstage())

			d.Use(v.name, v.id, kind.capability)
			content := make([]byte, 10)
			f, err := os.Open(file)
			dataMust(t, err)
			defer f.Close()
			if _, err := f.ReadAt(content, 0); err != nil || string(content) != "still mine" {
				t.Errorf("it has %q (%v)", content, err)
			}
			dataMust(t, f.Close())
			d.Release(v.name, v.id)
		})
	}
}

// nodeHold opens a file, to write to it until release.
func nodeHold(t *testing.T, name string) (release func()) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	dataMust(t, err)
	t.Cleanup(func() { f.Close() })
	return func() {
		t.Helper()
		if _, err := f.WriteAt([]byte("still mine"), 0); err != nil {
			t.Error(err)
		}
		dataMust(t, f.Sync())
		dataMust(t, f.Close())
	}
}
