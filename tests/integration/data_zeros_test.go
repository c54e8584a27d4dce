//go:build integration

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/tests/harness"
)

// dataPools are the kinds of pool, each so small that what is new must take the
// blocks of what was deleted.
var dataPools = []struct {
	name  string
	room  int64 // what a tenant fills, bytes
	start func(t *testing.T) (d *harness.Driver, poolDir string)
}{
	{"file", 256 * dataMiB, func(t *testing.T) (*harness.Driver, string) {
		d := harness.Start(t, harness.FilePool("512Mi"))
		return d, dataPool(d)
	}},
	{"directory on ext4", 128 * dataMiB, func(t *testing.T) (*harness.Driver, string) { return dataDirectory(t, "ext4", 256) }},
	{"directory on btrfs", 96 * dataMiB, func(t *testing.T) (*harness.Driver, string) { return dataDirectory(t, "btrfs", 512) }},
}

// dataDirectory starts a driver with a pool in a directory of a disk of its own,
// of that many MiB.
func dataDirectory(t *testing.T, fsType string, size int64) (*harness.Driver, string) {
	t.Helper()
	poolDir := filepath.Join(harness.Filesystem(t, fsType, size*dataMiB), "pool")
	dataMust(t, os.Mkdir(poolDir, 0o700))
	return harness.Start(t, harness.DirectoryPool(poolDir)), poolDir
}

// No byte of an earlier tenant is ever readable: a new volume is zeros from end
// to end, so is what a volume gains when it grows, and what a copy has beyond
// its source. What is written to it changes those bytes alone.
func TestDataOfADeletedVolumeIsNeverSeenAgain(t *testing.T) {
	block := harness.Block(harness.Writer)
	for _, p := range dataPools {
		for _, provisioning := range []string{"thin", "thick"} {
			t.Run(p.name+" "+provisioning, func(t *testing.T) {
				d, poolDir := p.start(t)
				first, small := p.room/8*7, p.room/4
				var islands []int64
				for at := int64(8192); at < first; at += 8*dataMiB + 12288 {
					islands = append(islands, at)
				}
				parameters := harness.Parameters("provisioning", provisioning)
				tenant := func(size int64) { // fills the pool with noise, and goes
					t.Helper()
					id := d.Create("tenant", size, block).GetVolumeId()
					dataFill(t, d.Use("tenant", id, block), size)
					d.Release("tenant", id)
					d.Delete(id)
				}

				tenant(p.room)
				id := d.Create("new", first, block, parameters).GetVolumeId()
				target := d.Use("new", id, block)
				if n := dataMustBeZero(t, target, 0); n != first {
					t.Errorf("it has %d bytes", n)
				}
				dataMark(t, target, islands)
				for range 2 {
					dataMustBeMarked(t, target, islands)
					dataMustBeZeroBut(t, target, islands)
					d.Release("new", id) // and then what is on the disk, not in memory
					d.Use("new", id, block)
				}
				d.Release("new", id)
				d.Delete(id)

				id = d.Create("small", small, block, parameters).GetVolumeId()
				target = d.Use("small", id, block)
				sum := dataFill(t, target, small)
				tenant(p.room - small)
				dataMustBeFreed(t, poolDir)
				dataGrow(t, d, id, target, "small", 2*small)
				if n := dataMustBeZero(t, target, small); n != small {
					t.Errorf("it grew by %d bytes", n)
				}
				dataMustHold(t, target, small, sum)
				d.Release("small", id)

				if p.name == "directory on btrfs" { // copies cannot be thick there
					parameters = harness.Parameters("provisioning", "thin")
				}
				larger := d.Create("larger", 3*small, block, parameters, harness.FromVolume(id)).GetVolumeId()
				target = d.Use("larger", larger, block)
				dataMustHold(t, target, small, sum)
				if n := dataMustBeZero(t, target, small); n != 2*small {
					t.Errorf("the copy has %d bytes after those of its source", n)
				}
				d.Release("larger", larger)
			})
		}
	}
}

// dataMustBeFreed waits until nothing is being freed in a pool.
func dataMustBeFreed(t *testing.T, poolDir string) {
	t.Helper()
	dataEventually(t, func() error {
		trash, err := os.ReadDir(filepath.Join(poolDir, ".trash"))
		if err == nil && len(trash) > 0 {
			err = fmt.Errorf("%s is not freed", trash[0].Name())
		}
		return err
	})
}

// dataMustBeZeroBut fails the test unless a device is zero but for the words of
// dataMark.
func dataMustBeZeroBut(t *testing.T, name string, marks []int64) {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	buf, zeros := make([]byte, dataMiB), make([]byte, dataMiB)
	for offset := int64(0); offset < dataDeviceSize(t, name); offset += dataMiB {
		if _, err := f.ReadAt(buf, offset); err != nil {
			t.Fatal(err)
		}
		for _, mark := range marks {
			if mark >= offset && mark < offset+dataMiB {
				copy(buf[mark-offset:], zeros[:4])
			}
		}
		if !bytes.Equal(buf, zeros) {
			t.Fatalf("%s has a trace of an earlier tenant near byte %d", name, offset)
		}
	}
}

// What is discarded or zeroed reads as zeros at once. A thin volume gives the
// blocks back to the pool; a thick one has been promised them.
func TestDataDiscardGivesBlocksBackUnlessTheVolumeIsThick(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	const size = 64 * dataMiB
	for _, provisioning := range []string{"thin", "thick"} {
		id := d.Create(provisioning, size, block, harness.Parameters("provisioning", provisioning)).GetVolumeId()
		target := d.Use(provisioning, id, block)
		dataFill(t, target, size)
		out, err := exec.Command("blkdiscard", target).CombinedOutput()
		if refused := err != nil; refused != (provisioning == "thick") {
			t.Errorf("blkdiscard of a %s volume: %v %s", provisioning, err, out)
		}
		f, err := os.OpenFile(target, os.O_RDWR, 0)
		dataMust(t, err)
		if provisioning == "thick" {
			err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
			if !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("punching a hole into a thick volume: %v", err)
			}
			dataMust(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 0, size))
		}
		dataMust(t, f.Close())
		dataMustBeZero(t, target, 0)
		d.Release(provisioning, id)
		used := dataBlocks(t, dataImage(dataPool(d), id))
		if provisioning == "thick" && used < size {
			t.Errorf("a thick volume of %d bytes has kept %d", size, used)
		}
		if provisioning == "thin" && used > dataMiB {
			t.Errorf("a thin volume has kept %d bytes", used)
		}
	}
}
