//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/tests/harness"
)

// toolbox is a directory that a driver looks for programs in before all others,
// or alone.
type toolbox struct {
	t   *testing.T
	dir string
}

func newToolbox(t *testing.T, d *harness.Driver, alone bool) toolbox {
	t.Helper()
	b := toolbox{t, filepath.Join(d.Dir, "tools")}
	dataMust(t, os.Mkdir(b.dir, 0o700))
	path := b.dir
	if !alone {
		path += ":" + os.Getenv("PATH")
	}
	d.Env = append(d.Env, "PATH="+path)
	return b
}

// put makes a program a shell script, in which $REAL is the real one.
func (b toolbox) put(name, script string) {
	b.t.Helper()
	text := "#!/bin/sh\nPATH=" + os.Getenv("PATH") + "\nREAL=" + name + "\n" + script + "\n"
	dataMust(b.t, os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o700))
}

func (b toolbox) remove(name string) {
	b.t.Helper()
	dataMust(b.t, os.Remove(filepath.Join(b.dir, name)))
}

// toolsHang are ways for a program not to end, and to leave more behind than
// itself. What is left writes a file when it is not killed.
const toolHangs = "trap '' TERM HUP INT\nsleep 300 & sleep 300\ntouch \"$(dirname \"$0\")/alive\""

// toolFaults are what can be wrong with a program, and what must be said of it.
// Empty code is any but OK.
var toolFaults = []struct {
	name, script string
	says         string
	code         codes.Code
	limit        time.Duration // of the call; 0 is none
}{
	{"fails", "echo out of cheese >&2; exit 1", "out of cheese", codes.Internal, 0},
	{"fails after its work", `"$REAL" "$@"; echo late regrets; exit 7`, "regrets", codes.Internal, 0},
	{"fails in the middle", `for d; do :; done; yes junk | dd of="$d" bs=64k count=8 conv=notrunc iflag=fullblock 2>/dev/null; echo power cut; exit 9`, "power cut", codes.Internal, 0},
	{"says too much", `yes "no end of words" | head -c 20000000; exit 3`, "no end of words", codes.Internal, 0},
	{"dies", "kill -9 $$", "killed", codes.Internal, 0},
	{"does nothing", "exit 0", "", codes.Internal, 0},
	{"hangs", toolHangs, "", codes.DeadlineExceeded, 2 * time.Second},
}

// A mkfs that fails, in whatever way, is told of with what it said, in the time
// that the call has. Nothing is left half made, no process and no device; other
// volumes do not notice; and with a mkfs that works, the volume does.
func TestAMkfsThatFailsLeavesNothingBehind(t *testing.T) {
	d := harness.New(t, harness.FilePool("8Gi"))
	box := newToolbox(t, d, false)
	d.Start()
	other := nodeCreate(d, "other", nodeBlock)
	for _, kind := range dataKinds[:3] {
		tool := "mkfs." + kind.name
		for i, fault := range toolFaults {
			if kind.name != "ext4" && fault.code == codes.Internal && i > 2 {
				continue // what is left does not depend on which it is
			}
			t.Run(tool+" "+fault.name, func(t *testing.T) {
				d := d.In(t)
				v := nodeCreate(d, fmt.Sprintf("%s-%d", kind.name, i), kind)
				box.put(tool, fault.script)
				began := time.Now()
				done := make(chan error, 1)
				go func() { done <- toolStage(v, fault.limit) }()
				dataMust(t, other.stage())
				dataMust(t, other.unstage())
				toolFailed(t, tool, fault.says, fault.code, <-done)
				if took := time.Since(began); took > time.Minute {
					t.Errorf("it took %s", took)
				}
				dataEventually(t, func() error { // a call that was given up ends a little later
					if loops := dataLoops(t, dataPool(d)); len(loops) > 0 {
						return fmt.Errorf("attached: %v", loops)
					}
					return toolAlive(box.dir)
				})
				if mounts := dataMounts(t, filepath.Join(d.Dir, "staging")); len(mounts) > 0 {
					t.Errorf("mounted: %v", mounts)
				}
				box.remove(tool)
				dataMust(t, v.stage())
				dataMust(t, v.publish())
				dataFill(t, kind.file(d.Target(v.name)), dataMiB)
				d.Release(v.name, v.id)
				dataMustBeClean(t, kind.name, dataImage(dataPool(d), v.id))
				d.Delete(v.id)
			})
		}
	}
	if _, err := os.Stat(filepath.Join(box.dir, "alive")); err == nil {
		t.Error("a program outlived the call")
	}
	d.Delete(other.id)
}

// toolStage stages a volume within a time.
func toolStage(v nodeVolume, limit time.Duration) error {
	if limit == 0 {
		return v.stage()
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, err := v.NodeStageVolume(ctx, v.stageRequest())
	return err
}

func toolFailed(t *testing.T, tool, says string, code codes.Code, err error) {
	t.Helper()
	got := status.Convert(err)
	if got.Code() != code {
		t.Errorf("%v; want %s", err, code)
		return
	}
	if code == codes.DeadlineExceeded { // the caller's own words
		return
	}
	if m := got.Message(); !strings.Contains(m, tool) || !strings.Contains(m, says) || len(m) > 4096 || strings.Contains(m, "\n") {
		t.Errorf("the message has %d bytes, and not in one line %q and %q: %.300s", len(m), tool, says, m)
	}
}

// toolAlive is an error while a program from a directory runs.
func toolAlive(dir string) error {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, line := range lines {
		text, err := os.ReadFile(line)
		if err == nil && strings.Contains(string(text), dir+"/") {
			return fmt.Errorf("it runs still: %q", text)
		}
	}
	return nil
}

// A mkfs that outlives the driver, which was killed, is nobody's writer whom the
// user could stop: a group with its volume waits until it has ended.
func TestAGroupWaitsForAMkfsThatACrashHasLeft(t *testing.T) {
	d := harness.New(t, harness.FilePool("8Gi"))
	box := newToolbox(t, d, false)
	ended := filepath.Join(box.dir, "ended")
	box.put("mkfs.ext4", `for d; do :; done
touch "$(dirname "$0")/begun"
while [ ! -e "$(dirname "$0")/end" ]; do dd if=/dev/zero of="$d" bs=4k count=64 conv=notrunc oflag=direct 2>/dev/null; done
touch "$(dirname "$0")/ended"`)
	d.Start()
	v := nodeCreate(d, "v", dataKinds[0])
	other := groupBlocks(t, d, "other")[0]
	staged := make(chan error, 1)
	go func() { staged <- toolStage(v, 0) }()
	exists := func(name string) func() error {
		return func() error { _, err := os.Stat(name); return err }
	}
	dataEventually(t, exists(filepath.Join(box.dir, "begun")))
	d.Kill()
	if err := <-staged; err == nil {
		t.Fatal("the call ended well, and was to be cut off")
	}
	d.Start()
	_, err := groupCreate(d, "g", v.id, other)
	ctlWant(t, "CreateVolumeGroupSnapshot", err, codes.Aborted, "mkfs")
	dataMust(t, os.WriteFile(filepath.Join(box.dir, "end"), nil, 0o600))
	dataEventually(t, exists(ended))
	dataEventually(t, func() error { _, err := groupCreate(d, "g", v.id, other); return err })
	box.remove("mkfs.ext4")
	dataMust(t, v.stage())
	dataMust(t, v.unstage())
}

// Where a program is not installed, that is said, with the package that has it.
func TestAToolThatIsMissingIsNamed(t *testing.T) {
	d := harness.Start(t, harness.FilePool("8Gi"))
	d.Stop()
	newToolbox(t, d, true)
	d.Start()
	for _, kind := range dataKinds[:3] {
		v := nodeCreate(d, kind.name, kind)
		err := v.stage()
		dataCode(t, err, codes.Internal, "mkfs."+kind.name, "not installed", map[string]string{"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}[kind.name])
		dataMustBeIdle(t, d, dataPool(d))
		d.Delete(v.id)
	}
	block := nodeCreate(d, "block", nodeBlock) // which needs none
	dataMust(t, block.stage())
	dataMust(t, block.unstage())
	d.Delete(block.id)
}

// The same of the check of an ext4 in which the kernel found errors. It is not
// mounted before it is well.
func TestACheckThatFailsIsToldOf(t *testing.T) {
	d := harness.New(t, harness.FilePool("4Gi"))
	box := newToolbox(t, d, false)
	d.Start()
	v := nodeCreate(d, "v", dataKinds[0])
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	sum := dataFill(t, filepath.Join(d.Target("v"), "file"), dataMiB)
	d.Release("v", v.id)
	image := dataImage(dataPool(d), v.id)
	dataRun(t, "debugfs", "-w", "-R", "set_super_value state 2", image)
	for _, fault := range []struct {
		script, says string
		code         codes.Code
		limit        time.Duration
	}{
		{"echo beyond me; exit 4", "beyond me", codes.DataLoss, 0},
		{"echo wrong usage; exit 16", "wrong usage", codes.Internal, 0},
		{"kill -9 $$", "killed", codes.Internal, 0},
		{toolHangs, "", codes.DeadlineExceeded, 2 * time.Second},
	} {
		box.put("e2fsck", fault.script)
		toolFailed(t, "e2fsck", fault.says, fault.code, toolStage(v, fault.limit))
		dataEventually(t, func() error {
			if loops := dataLoops(t, dataPool(d)); len(loops) > 0 {
				return fmt.Errorf("attached: %v", loops)
			}
			return toolAlive(box.dir)
		})
	}
	box.remove("e2fsck")
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	dataMustHold(t, filepath.Join(d.Target("v"), "file"), dataMiB, sum)
	d.Release("v", v.id)
	dataMustBeClean(t, "ext4", image)
}

// And of the growth of an ext4 by a driver that may not let it grow while it is
// mounted.
func TestAResizeThatFailsIsToldOf(t *testing.T) {
	d := harness.New(t, harness.FilePool("4Gi"))
	box := newToolbox(t, d, false)
	wrapper := filepath.Join(d.Dir, "unprivileged")
	dataMust(t, os.WriteFile(wrapper, []byte("#!/bin/sh\nexec setpriv --inh-caps=-sys_resource --bounding-set=-sys_resource "+d.Binary+" \"$@\"\n"), 0o700))
	d.Binary = wrapper
	d.Start()
	v := nodeCreate(d, "v", dataKinds[0])
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	sum := dataFill(t, filepath.Join(d.Target("v"), "file"), dataMiB)
	d.Release("v", v.id)
	_, err := ctlExpands(d, v.id, 256*dataMiB).call()
	dataMust(t, err)
	for _, tool := range []string{"e2fsck", "resize2fs"} {
		for _, fault := range []struct {
			script, says string
			code         codes.Code
			limit        time.Duration
		}{
			{"echo not today; exit 8", "not today", codes.Internal, 0},
			{toolHangs, "", codes.DeadlineExceeded, 2 * time.Second},
		} {
			box.put(tool, fault.script)
			toolFailed(t, tool, fault.says, fault.code, toolStage(v, fault.limit))
			dataEventually(t, func() error {
				if loops := dataLoops(t, dataPool(d)); len(loops) > 0 {
					return fmt.Errorf("attached: %v", loops)
				}
				return toolAlive(box.dir)
			})
		}
		box.remove(tool)
	}
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	dataMustSpan(t, dataKinds[0], d.Target("v"), 256*dataMiB)
	dataMustHold(t, filepath.Join(d.Target("v"), "file"), dataMiB, sum)
	d.Release("v", v.id)
}

// The filesystem of a new pool that cannot be made stops the start, with what the
// program said, and the next start begins anew. One that hangs ends with the
// driver.
func TestAPoolWhoseFilesystemCannotBeMadeStopsTheStart(t *testing.T) {
	d := harness.New(t, harness.FilePool("1Gi"))
	box := newToolbox(t, d, false)
	before := ctlTree(t, filepath.Join(d.Dir, "state"))
	for _, fault := range toolFaults {
		if fault.limit > 0 {
			continue
		}
		box.put("mkfs.xfs", fault.script)
		ctlStartFails(t, d, "pools[0]", "mkfs.xfs", fault.says)
		for _, file := range []string{"default.img", "default.img.staging"} {
			if _, err := os.Lstat(filepath.Join(d.Dir, file)); err == nil {
				t.Errorf("%s: %s is left", fault.name, file)
			}
		}
		ctlSame(t, fault.name, before, ctlTree(t, filepath.Join(d.Dir, "state")))
	}
	box.put("mkfs.xfs", toolHangs)
	cmd := d.Command()
	dataMust(t, cmd.Start())
	dataEventually(t, func() error {
		if toolAlive(box.dir) == nil {
			return errors.New("mkfs.xfs does not run")
		}
		return nil
	})
	dataMust(t, cmd.Process.Signal(syscall.SIGTERM))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		_ = cmd.Process.Kill()
		t.Errorf("the driver does not end while mkfs.xfs hangs: %v", <-ended)
	}
	dataEventually(t, func() error { return toolAlive(box.dir) })
	box.remove("mkfs.xfs")
	d.Start()
	d.Delete(d.Create("v", 16*dataMiB, nodeBlock.capability).GetVolumeId())
}

// A device is only formatted if blkid says that nothing is on it. One that cannot
// say so is no permission.
func TestADeviceIsNotFormattedWithoutBlkid(t *testing.T) {
	device, _ := ctlDevice(t, 512*ctlMiB)
	d := harness.New(t, "pools:\n- name: default\n  source: {device: "+device+"}\n")
	box := newToolbox(t, d, false)
	before := ctlSum(t, device)
	for script, says := range map[string]string{
		"echo cannot look; exit 4":        "cannot look",
		"echo TYPE=mystery":               "mystery",
		"kill -9 $$":                      "killed",
		"echo AMBIVALENT=several; exit 8": "several",
	} {
		box.put("blkid", script)
		ctlStartFails(t, d, "pools[0]: source.device", says)
	}
	box.remove("blkid")
	env := d.Env
	d.Env = []string{"PATH=" + box.dir}
	ctlStartFails(t, d, "pools[0]: source.device", "blkid")
	d.Env = env
	if ctlSum(t, device) != before {
		t.Error("the device was written to")
	}
	d.Start()
}

// A freeze waits for writes that are under way. One that takes too long is given
// up: the snapshot is refused in the time that is set for it, the writer goes on
// as soon as it can, nothing stays frozen, and no other volume is concerned.
func TestAFreezeThatTakesTooLongIsGivenUp(t *testing.T) {
	d := harness.Start(t, harness.FilePool("4Gi"))
	v, other := nodeCreate(d, "v", dataKinds[0]), nodeCreate(d, "other", dataKinds[0])
	for _, one := range []nodeVolume{v, other} {
		dataMust(t, one.stage())
		dataMust(t, one.publish())
	}
	file := filepath.Join(d.Target("v"), "file")
	dataFill(t, file, dataMiB)
	release, written := toolStuckWrite(t, file)
	defer release()

	began := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := ctlSnaps(d, "s", v.id).call()
		done <- err
	}()
	for i := 0; ; i++ { // as often as there is time
		s := d.Snapshot(fmt.Sprintf("other-%d", i), other.id)
		dataFill(t, filepath.Join(d.Target("other"), "file"), dataMiB)
		if _, err := ctlDeletesSnapshot(d, s.GetSnapshotId()).call(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			dataCode(t, err, codes.DeadlineExceeded, "did not come to rest in time")
			if i < 3 {
				t.Errorf("only %d snapshots of another volume were cut meanwhile", i)
			}
		default:
			time.Sleep(50 * time.Millisecond)
			continue
		}
		break
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %s", took)
	}
	if entries, err := os.ReadDir(filepath.Join(dataPool(d), "snapshots")); err != nil || len(entries) > 0 {
		t.Errorf("snapshots are left: %v, %v", entries, err)
	}
	release()
	dataMust(t, <-written)
	dataFill(t, file, dataMiB) // which would hang if it were frozen
	dataEventually(t, func() error {
		_, err := ctlSnaps(d, "s", v.id).call()
		return err
	})
	for _, one := range []nodeVolume{v, other} {
		d.Release(one.name, one.id)
	}
}

// toolStuckWrite begins a write(2) to a file that does not end before release,
// because its data is in memory whose first touch nobody answers: userfaultfd(2).
func toolStuckWrite(t *testing.T, file string) (release func(), written chan error) {
	t.Helper()
	const (
		api      = 0xc018aa3f // UFFDIO_API and UFFDIO_REGISTER of linux/userfaultfd.h
		register = 0xc020aa00
		missing  = 1 // UFFDIO_REGISTER_MODE_MISSING
	)
	uffd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		t.Fatal("userfaultfd: ", errno)
	}
	memory, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	dataMust(t, err)
	for _, request := range []struct {
		number   uintptr
		argument []uint64
	}{
		{api, []uint64{0xaa, 0, 0}}, // UFFD_API
		{register, []uint64{uint64(uintptr(unsafe.Pointer(&memory[0]))), uint64(len(memory)), missing, 0}},
	} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uffd, request.number, uintptr(unsafe.Pointer(&request.argument[0]))); errno != 0 {
			t.Fatal("userfaultfd: ", errno)
		}
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	dataMust(t, err)
	written = make(chan error, 1)
	began := make(chan struct{})
	go func() {
		close(began)
		_, err := unix.Write(int(f.Fd()), memory)
		written <- errors.Join(err, f.Close())
	}()
	<-began
	dataEventually(t, func() error { // somebody waits in handle_userfault
		stacks, _ := filepath.Glob("/proc/self/task/*/wchan")
		for _, stack := range stacks {
			if text, err := os.ReadFile(stack); err == nil && strings.Contains(string(text), "userfault") {
				return nil
			}
		}
		return errors.New("the write does not wait")
	})
	closed := false
	return func() {
		if !closed {
			closed = true
			dataMust(t, unix.Close(int(uffd)))
		}
	}, written
}

// An unmount that hangs in the kernel, because the pool takes no write, costs its
// own call and no other: it ends when its time is over, volumes of another pool
// come and go, what is asked of the driver is answered, and when the pool goes on
// the volume can be left.
func TestAWedgedUnmountHoldsUpNobodyElse(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	v := nodeCreate(d, "v", dataKinds[0])
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	dataFill(t, filepath.Join(d.Target("v"), "file"), dataMiB)
	dataMust(t, v.unpublish(d.Target("v")))
	// What is not written yet has to be, to unmount.
	dataMust(t, os.WriteFile(filepath.Join(d.Staging("v"), "late"), make([]byte, 4*dataMiB), 0o600))
	thaw := ctlFrozen(t, ctlFilePool(d, "default"))

	unstage := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		_, err := d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: d.Staging("v")})
		return err
	}
	began := time.Now()
	dataCode(t, unstage(2*time.Second), codes.DeadlineExceeded)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	// Once more; the mount may be gone already, and the device is not free.
	switch err := unstage(2 * time.Second); status.Code(err) {
	case codes.DeadlineExceeded, codes.Aborted, codes.FailedPrecondition:
	default:
		t.Errorf("once more: %v", err)
	}
	for i := range 3 {
		name := fmt.Sprintf("other-%d", i)
		id := d.Create(name, 64*dataMiB, dataKinds[0].capability, harness.Parameters("pool", "other")).GetVolumeId()
		dataFill(t, filepath.Join(d.Use(name, id, dataKinds[0].capability), "file"), dataMiB)
		d.Snapshot(name, id)
		d.Release(name, id)
		d.Delete(id)
	}
	if _, err := d.ListVolumes(d.Context(), &csi.ListVolumesRequest{}); err != nil {
		t.Error(err)
	}
	if probe, err := d.Probe(d.Context(), &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("Probe: %v, %v", probe, err)
	}
	thaw()
	dataEventually(t, func() error { return unstage(20 * time.Second) })
	dataMust(t, v.stage())
	dataMust(t, v.publish())
	if data, err := os.ReadFile(filepath.Join(d.Target("v"), "late")); err != nil || int64(len(data)) != 4*dataMiB {
		t.Errorf("what was written last: %d bytes, %v", len(data), err)
	}
	d.Release("v", v.id)
	d.Delete(v.id)
}
