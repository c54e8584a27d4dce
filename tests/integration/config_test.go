//go:build integration

package integration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlStartFails starts a driver that must not come up: it ends soon with code 1
// and tells why in one line on standard error that has all the words. The line
// is the result.
func ctlStartFails(t *testing.T, d *harness.Driver, words ...string) string {
	t.Helper()
	cmd := d.Command()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	ctlMust(t, cmd.Start())
	timer := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("a start that must fail: %v; want exit code 1\n%s", err, errOut.String())
	}
	if out.Len() > 0 {
		t.Errorf("a start that must fail says on standard output: %s", out.String())
	}
	line := strings.TrimSuffix(errOut.String(), "\n")
	if line == "" || strings.Contains(line, "\n") {
		t.Errorf("a start that must fail says more or less than one line:\n%s", errOut.String())
	}
	for _, word := range words {
		if !strings.Contains(line, word) {
			t.Errorf("a start that must fail says %q, without %q", line, word)
		}
	}
	return line
}

// What cannot be a configuration stops the start, with one line that names the
// field, before anything is touched.
func TestABadConfigurationStopsTheStart(t *testing.T) {
	const good = "source: {directory: $DIR/pool}"
	for _, c := range []struct {
		rule, config string
		words        []string
	}{
		{"nothing", "", []string{"pools"}},
		{"no YAML", "pools: [", []string{"config.yaml", "yaml"}},
		{"not a mapping", "- a\n- b\n", []string{"pools"}},
		{"no pools", "pools: []\n", []string{"pools"}},
		{"an unknown field", "pools: [{name: a, " + good + "}]\nlogLevel: 5\n", []string{"logLevel", "unknown", "pools"}},
		{"an unknown field of a pool", "pools: [{name: a, " + good + ", quota: 5}]\n", []string{"pools[0].quota", "unknown", "reserve", "overcommit"}},
		{"an unknown field of a source", "pools: [{name: a, source: {directory: $DIR/pool, lvm: vg0}}]\n", []string{"pools[0].source.lvm", "unknown", "file", "directory", "device"}},
		{"an unknown field of a file", "pools: [{name: a, source: {file: {path: $DIR/a.img, size: 1Gi, format: qcow2}}}]\n", []string{"pools[0].source.file.format", "unknown"}},
		{"a field twice", "pools: [{name: a, name: b, " + good + "}]\n", []string{"name"}},
		{"no source", "pools: [{name: a}]\n", []string{"pools[0].source", "file, directory, device"}},
		{"an empty source", "pools: [{name: a, source: {}}]\n", []string{"pools[0].source", "file, directory, device"}},
		{"two sources", "pools: [{name: a, source: {directory: $DIR/pool, device: /dev/null}}]\n", []string{"pools[0].source", "directory and device"}},
		{"three sources", "pools: [{name: a, source: {directory: $DIR/pool, device: /dev/null, file: {path: $DIR/a.img, size: 1Gi}}}]\n", []string{"pools[0].source", "all"}},
		{"no name", "pools: [{" + good + "}]\n", []string{"pools[0].name"}},
		{"a name with a path", "pools: [{name: ../a, " + good + "}]\n", []string{"pools[0].name", "../a"}},
		{"one name twice", "pools: [{name: a, " + good + "}, {name: a, source: {directory: $DIR/other}}]\n", []string{"pools[1].name", "pools[0]"}},
		{"one directory twice", "pools: [{name: a, " + good + "}, {name: b, source: {directory: $DIR/./pool/}}]\n", []string{"pools[1].source", "pools[0]"}},
		{"a relative path", "pools: [{name: a, source: {directory: pool}}]\n", []string{"pools[0].source.directory", "absolute"}},
		{"no path", "pools: [{name: a, source: {file: {size: 1Gi}}}]\n", []string{"pools[0].source.file.path"}},
		{"no size", "pools: [{name: a, source: {file: {path: $DIR/a.img}}}]\n", []string{"pools[0].source.file.size"}},
		{"a size that is none", "pools: [{name: a, source: {file: {path: $DIR/a.img, size: large}}}]\n", []string{"pools[0].source.file.size", "large"}},
		{"a size too small", "pools: [{name: a, source: {file: {path: $DIR/a.img, size: 100Mi}}}]\n", []string{"pools[0].source.file.size", "512Mi"}},
		{"a reserve that is none", "pools: [{name: a, " + good + ", reserve: some}]\n", []string{"pools[0].reserve", "some"}},
		{"a reserve of all", "pools: [{name: a, " + good + ", reserve: 100%}]\n", []string{"pools[0].reserve", "100%"}},
		{"less than no overcommit", "pools: [{name: a, " + good + ", overcommit: 0.5}]\n", []string{"pools[0].overcommit", "0.5"}},

		{"a directory that is not there", "pools: [{name: a, source: {directory: $DIR/none}}]\n", []string{"pools[0]", "source.directory", "none", "no such file or directory"}},
		{"a directory that is a file", "pools: [{name: a, source: {directory: $DIR/file}}]\n", []string{"pools[0]", "source.directory", "file", "not a directory"}},
		{"a directory that is not empty", "pools: [{name: a, source: {directory: $DIR/full}}]\n", []string{"pools[0]", "source.directory", "full", "not empty", "keep.txt"}},
		{"a file in a directory that is not there", "pools: [{name: a, source: {file: {path: $DIR/none/a.img, size: 1Gi}}}]\n", []string{"pools[0]", "source.file.path", "none"}},
		{"a file that is something else", "pools: [{name: a, source: {file: {path: $DIR/file, size: 1Gi}}}]\n", []string{"pools[0]", "source.file.path", "file"}},
		{"a file that is a directory", "pools: [{name: a, source: {file: {path: $DIR/full, size: 1Gi}}}]\n", []string{"pools[0]", "source.file.path", "not a regular file"}},
		{"a file that is a link", "pools: [{name: a, source: {file: {path: $DIR/link, size: 1Gi}}}]\n", []string{"pools[0]", "source.file.path", "not a regular file"}},
		{"a file larger than any disk", "pools: [{name: a, source: {file: {path: $DIR/a.img, size: 4Pi}}}]\n", []string{"pools[0]", "source.file", "a.img"}},
		{"a device that is not there", "pools: [{name: a, source: {device: /dev/disk/by-id/none}}]\n", []string{"pools[0]", "source.device", "none"}},
		{"a device that is a file", "pools: [{name: a, source: {device: $DIR/file}}]\n", []string{"pools[0]", "source.device", "not a block device"}},
		{"a device that has no blocks", "pools: [{name: a, source: {device: /dev/null}}]\n", []string{"pools[0]", "source.device", "not a block device"}},
		{"the second of two", "pools: [{name: a, " + good + "}, {name: b, source: {directory: $DIR/none}}]\n", []string{"pools[1]", "source.directory", "none"}},
		{"the second of two files", "pools: [{name: a, source: {file: {path: $DIR/a.img, size: 1Gi}}}, {name: b, source: {directory: $DIR/full}}]\n", []string{"pools[1]", "source.directory", "full"}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			d := harness.New(t, c.config)
			ctlMust(t, os.Mkdir(filepath.Join(d.Dir, "pool"), 0o700))
			ctlPlant(t, d.Dir, map[string]int64{"file": ctlMiB, "full/keep.txt": 10})
			ctlMust(t, os.Symlink("file", filepath.Join(d.Dir, "link")))
			before := ctlTree(t, d.Dir)
			ctlStartFails(t, d, append(c.words, "config.yaml")...)
			ctlSame(t, "what was there", before, ctlTree(t, d.Dir))
		})
	}
	t.Run("a file that is not there", func(t *testing.T) {
		d := harness.New(t, "")
		ctlMust(t, os.Remove(d.Config))
		ctlStartFails(t, d, d.Config, "no such file or directory")
	})
}

// ctlDevice makes a device of that size, which reads as zeros, over a file. A
// test gives the device's path and its file's.
func ctlDevice(t *testing.T, size int64) (device, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "device.img")
	ctlMust(t, os.WriteFile(file, nil, 0o600))
	ctlMust(t, os.Truncate(file, size))
	return ctlLoop(t, file), file
}

func ctlRun(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// ctlSum is the checksum of a device's first 64 MiB as they are on disk: no
// format leaves them alone.
func ctlSum(t *testing.T, device string) string {
	t.Helper()
	f, err := os.Open(device)
	ctlMust(t, err)
	defer f.Close()
	ctlMust(t, f.Sync())
	sum := sha256.New()
	_, err = io.Copy(sum, io.LimitReader(f, 64*ctlMiB))
	ctlMust(t, err)
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// Nothing is ever formatted that is not provably blank.
func TestADeviceThatIsNotBlankIsNotTouched(t *testing.T) {
	write := func(offset int64, data string) func(t *testing.T, device string) {
		return func(t *testing.T, device string) {
			t.Helper()
			f, err := os.OpenFile(device, os.O_WRONLY, 0)
			ctlMust(t, err)
			defer f.Close()
			if offset < 0 {
				offset += 64 * ctlMiB
			}
			_, err = f.WriteAt([]byte(data), offset)
			ctlMust(t, err)
			ctlMust(t, f.Sync())
		}
	}
	tool := func(name string, args ...string) func(t *testing.T, device string) {
		return func(t *testing.T, device string) { t.Helper(); ctlRun(t, name, append(args, device)...) }
	}
	// The table of a disk with one partition that spans it (type 0x83).
	mbr := ctlSector(map[int]byte{446 + 4: 0x83, 446 + 8: 1, 446 + 12: 0xff, 446 + 13: 0xff, 446 + 14: 0x01, 510: 0x55, 511: 0xaa})
	for _, c := range []struct {
		rule    string
		prepare func(t *testing.T, device string)
		words   []string
	}{
		{"ext4", tool("mkfs.ext4", "-q", "-F"), []string{"ext4"}},
		{"ext4 with the label of our pools", tool("mkfs.ext4", "-q", "-F", "-L", "orlop"), []string{"ext4"}},
		{"swap", tool("mkswap"), []string{"swap"}},
		{"a table of partitions", write(0, mbr), nil},
		{"one byte at its beginning", write(0, "x"), []string{"data"}},
		{"one byte in its middle", write(33*ctlMiB+12345, "x"), []string{"data"}},
		{"one byte at its end", write(-1, "x"), []string{"data"}},
		{"the signature of LVM", write(512, "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x8c\xb4\x9b\x5c\x20\x00\x00\x00LVM2 001"), nil},
		{"an encrypted disk", write(0, "LUKS\xba\xbe\x00\x01"), nil},
	} {
		t.Run(c.rule, func(t *testing.T) {
			device, _ := ctlDevice(t, 64*ctlMiB)
			c.prepare(t, device)
			before := ctlSum(t, device)
			d := harness.New(t, "pools: [{name: default, source: {device: "+device+"}}]\n")
			tree := ctlTree(t, d.Dir)
			ctlStartFails(t, d, append(c.words, "pools[0]", "source.device", device)...)
			ctlSame(t, "the driver's directories", tree, ctlTree(t, d.Dir))
			if ctlSum(t, device) != before {
				t.Error("the device was written")
			}
		})
	}
	t.Run("an XFS of somebody else", func(t *testing.T) {
		device, _ := ctlDevice(t, 320*ctlMiB)
		ctlRun(t, "mkfs.xfs", "-q", device)
		before := ctlSum(t, device)
		d := harness.New(t, "pools: [{name: default, source: {device: "+device+"}}]\n")
		ctlStartFails(t, d, "pools[0]", "source.device", device, "xfs")
		if ctlSum(t, device) != before {
			t.Error("the device was written")
		}
	})
	t.Run("a device that is in use", func(t *testing.T) {
		device, _ := ctlDevice(t, 64*ctlMiB)
		// As a volume manager or an array holds it, which leaves no trace in
		// the table of mounts.
		held, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0)
		ctlMust(t, err)
		defer held.Close()
		d := harness.New(t, "pools: [{name: default, source: {device: "+device+"}}]\n")
		ctlStartFails(t, d, "pools[0]", "source.device", device, "in use")
	})
	t.Run("a device that is mounted", func(t *testing.T) {
		pool := ctlExt4(t, 64*ctlMiB)
		ctlPlant(t, pool, map[string]int64{"keep.txt": 10})
		before := ctlTree(t, pool)
		at, err := filesystem.MountAt(filepath.Dir(pool))
		ctlMust(t, err)
		d := harness.New(t, "pools: [{name: default, source: {device: "+at.Source+"}}]\n")
		ctlStartFails(t, d, "pools[0]", "source.device", at.Source)
		ctlSame(t, "what is on it", before, ctlTree(t, pool))
	})
	t.Run("a device too small", func(t *testing.T) {
		device, file := ctlDevice(t, 64*ctlMiB)
		d := harness.New(t, "pools: [{name: default, source: {device: "+device+"}}]\n")
		ctlStartFails(t, d, "pools[0]", "source.device", device)
		if n := ctlBlocks(t, file); n > 0 {
			t.Errorf("%d bytes were written to the device", n)
		}
	})
	t.Run("a blank one behind one that is not", func(t *testing.T) {
		full, _ := ctlDevice(t, 64*ctlMiB)
		write(0, "x")(t, full)
		blank, file := ctlDevice(t, 512*ctlMiB)
		d := harness.New(t, "pools: [{name: first, source: {device: "+blank+"}}, {name: second, source: {device: "+full+"}}]\n")
		ctlStartFails(t, d, "pools[1]", "source.device", full)
		if n := ctlBlocks(t, file); n > 0 {
			t.Errorf("%d bytes were written to the blank device, though the start was to fail", n)
		}
	})
}

// ctlSector makes a sector with these bytes in it.
func ctlSector(bytes map[int]byte) string {
	sector := [512]byte{}
	for at, b := range bytes {
		sector[at] = b
	}
	return string(sector[:])
}

func TestABlankDeviceIsMadeAPoolAndStaysOne(t *testing.T) {
	device, file := ctlDevice(t, 512*ctlMiB)
	link := filepath.Join(t.TempDir(), "by-id")
	ctlMust(t, os.Symlink(device, link)) // as in /dev/disk/by-id
	d := harness.Start(t, "pools: [{name: default, source: {device: "+link+"}}]\n")
	block := harness.Block(harness.Writer)
	room := ctlRoom(t, d, "default")
	if room < 380*ctlMiB || room > 512*ctlMiB {
		t.Errorf("a disk of 512 MiB has room for %d bytes", room)
	}
	v := d.Create("v", 64*ctlMiB, block).GetVolumeId()
	f := ctlUse(t, d, "v", v)
	ctlFill(t, f, 64*ctlMiB, ctlMiB, 3)
	s := d.Snapshot("s", v).GetSnapshotId() // shares blocks: it takes no time
	ctlMust(t, f.Close())

	d.Restart() // with a volume in use
	d.Kill()
	d.Start()
	f, err := os.Open(d.Target("v"))
	ctlMust(t, err)
	ctlFilled(t, "the volume in use", f, 64*ctlMiB, ctlMiB, 3)
	ctlMust(t, f.Close())
	d.Release("v", v)
	restored := d.Create("restored", 0, block, harness.FromSnapshot(s)).GetVolumeId()
	f = ctlUse(t, d, "restored", restored)
	ctlFilled(t, "the restored volume", f, 64*ctlMiB, ctlMiB, 3)
	ctlMust(t, f.Close())
	d.Release("restored", restored)
	d.Stop()
	if _, err := filesystem.MountAt(ctlFilePool(d, "default")); !errors.Is(err, filesystem.ErrNotMounted) {
		t.Errorf("the pool is still mounted after the driver has ended: %v", err)
	}

	// A larger disk is used to its end.
	ctlMust(t, os.Truncate(file, ctlGiB))
	f, err = os.Open(device)
	ctlMust(t, err)
	ctlMust(t, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0))
	ctlMust(t, f.Close())
	d.Start()
	if got := ctlRoom(t, d, "default") + 3*64*ctlMiB; got < room+400*ctlMiB {
		t.Errorf("512 MiB more of disk gave room for %d bytes more", got-room)
	}
	// It is not taken for blank when its driver has forgotten it.
	d.Stop()
	ctlMust(t, os.RemoveAll(filepath.Join(d.Dir, "state")))
	d.Start()
	if got := ctlIDs(t, d); !slices.Equal(got, []string{restored, v}) {
		t.Errorf("volumes: %v", got)
	}
}

// The disk of a pool that has been replaced by a blank one is not formatted.
func TestABlankDeviceInThePlaceOfAPoolIsNotFormatted(t *testing.T) {
	first, _ := ctlDevice(t, 512*ctlMiB)
	second, file := ctlDevice(t, 512*ctlMiB)
	d := harness.New(t, "pools: [{name: default, source: {device: $DIR/disk}}]\n")
	disk := filepath.Join(d.Dir, "disk") // as one in /dev/disk
	ctlMust(t, os.Symlink(first, disk))
	d.Start()
	d.Stop()
	ctlMust(t, os.Remove(disk))
	ctlMust(t, os.Symlink(second, disk))
	ctlStartFails(t, d, "pools[0]", "source.device", disk, "is its disk mounted?")
	if n := ctlBlocks(t, file); n > 0 {
		t.Errorf("%d bytes were written to the device", n)
	}
}
