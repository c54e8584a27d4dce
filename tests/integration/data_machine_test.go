//go:build integration

package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

const (
	dataMiB = int64(1) << 20
	dataGiB = int64(1) << 30
)

// dataKind is a way to use a volume, with a size that is small for it.
type dataKind struct {
	name       string // the filesystem, or "block"
	size       int64
	capability *csi.VolumeCapability
}

var dataKinds = []dataKind{
	{"ext4", 64 * dataMiB, harness.Mount("ext4", harness.Writer)},
	{"xfs", 320 * dataMiB, harness.Mount("xfs", harness.Writer)},
	{"btrfs", 256 * dataMiB, harness.Mount("btrfs", harness.Writer)},
	{"block", 64 * dataMiB, harness.Block(harness.Writer)},
}

// growsInUse tells whether the kernel lets a volume of the kind grow while it is
// mounted. For ext4 it wants CAP_SYS_RESOURCE, which even root does not have in
// some containers and virtual machines; such a volume grows when it is staged.
func (k dataKind) growsInUse(t *testing.T) bool {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	dataMust(t, unix.Capget(&header, &data[0]))
	return k.name != "ext4" || data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

func (k dataKind) isBlock() bool { return k.name == "block" }

// file is what a test writes to at a path where a volume of the kind is
// published: the device, or a file in the filesystem.
func (k dataKind) file(target string) string {
	if k.isBlock() {
		return target
	}
	return filepath.Join(target, "file")
}

// dataRounds is how often a test repeats something that only may go wrong. The
// environment variable ORLOP_TEST_ROUNDS multiplies it, for runs over night.
func dataRounds(t testing.TB, n int) int {
	t.Helper()
	factor := 1
	if s := os.Getenv("ORLOP_TEST_ROUNDS"); s != "" {
		var err error
		if factor, err = strconv.Atoi(s); err != nil || factor < 1 {
			t.Fatalf("ORLOP_TEST_ROUNDS=%s is not a positive number", s)
		}
	}
	return n * factor
}

// dataRun runs a program to its end and gives what it wrote.
func dataRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// dataMust fails the test if err is not nil.
func dataMust(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dataCode fails the test unless err has the code, and the words in its
// message.
func dataCode(t testing.TB, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("got %v, want code %s", err, code)
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(word)) {
			t.Errorf("the error does not say %q: %v", word, err)
		}
	}
}

// dataPool is the directory of a pool with a filesystem of its own.
func dataPool(d *harness.Driver) string { return filepath.Join(d.Dir, "state", "mounts", "default") }

// dataImage is the image file of a volume.
func dataImage(poolDir, volumeID string) string {
	return filepath.Join(poolDir, "volumes", path.Base(volumeID), "data")
}

// dataBlocks is what a file takes on its filesystem, in bytes.
func dataBlocks(t testing.TB, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	dataMust(t, unix.Stat(name, &st))
	return st.Blocks * 512
}

// dataLoops lists the loop devices whose backing file is below a directory, as
// in "loop7".
func dataLoops(t testing.TB, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	dataMust(t, err)
	var names []string
	for _, file := range files {
		// One that is gone meanwhile is somebody else's.
		if backing, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(backing), dir+"/") {
			names = append(names, strings.Split(file, "/")[3])
		}
	}
	return names
}

// dataMounts lists the paths below a directory where something is mounted.
func dataMounts(t testing.TB, dir string) []string {
	t.Helper()
	mounts, err := filesystem.Mounts()
	dataMust(t, err)
	var paths []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Path, dir+"/") {
			paths = append(paths, m.Path)
		}
	}
	return paths
}

// dataMustBeIdle fails the test if a volume of a driver's pool is attached or
// mounted.
func dataMustBeIdle(t testing.TB, d *harness.Driver, poolDir string) {
	t.Helper()
	if loops := dataLoops(t, poolDir); len(loops) > 0 {
		t.Errorf("still attached: %v", loops)
	}
	mounts := slices.DeleteFunc(dataMounts(t, d.Dir), func(p string) bool { return p == poolDir })
	if len(mounts) > 0 {
		t.Errorf("still mounted: %v", mounts)
	}
}

// dataMustHoldNothing fails the test if a pool has anything in it, once what
// was deleted is freed.
func dataMustHoldNothing(t testing.TB, poolDir string) {
	t.Helper()
	for _, dir := range []string{"volumes", "snapshots", ".staging", ".trash"} {
		dataEventually(t, func() error {
			entries, err := os.ReadDir(filepath.Join(poolDir, dir))
			if err == nil && len(entries) > 0 {
				err = fmt.Errorf("%s still has %s", dir, entries[0].Name())
			}
			return err
		})
	}
}

// dataEventually waits until check gives no error.
func dataEventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// dataFill writes n bytes of noise to the beginning of a file or device, brings
// them to stable storage, and gives their checksum.
func dataFill(t testing.TB, name string, n int64) (sum uint32) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	dataMust(t, err)
	defer f.Close()
	noise := make([]byte, dataMiB)
	rand.Read(noise)
	for at := int64(0); at < n; at += dataMiB {
		binary.LittleEndian.PutUint64(noise, uint64(at)) // no piece is like another
		piece := noise[:min(n-at, dataMiB)]
		if _, err := f.WriteAt(piece, at); err != nil {
			t.Fatal(err)
		}
		sum = crc32.Update(sum, dataCastagnoli, piece)
	}
	dataMust(t, f.Sync())
	dataMust(t, f.Close())
	return sum
}

var dataCastagnoli = crc32.MakeTable(crc32.Castagnoli)

// dataSum is the checksum of the first n bytes of a file or device.
func dataSum(t testing.TB, name string, n int64) uint32 {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	sum := crc32.New(dataCastagnoli)
	if _, err := io.CopyBuffer(struct{ io.Writer }{sum}, io.LimitReader(f, n), make([]byte, dataMiB)); err != nil {
		t.Fatal(err)
	}
	return sum.Sum32()
}

// dataMustHold fails the test unless the first n bytes of a file or device have
// the checksum.
func dataMustHold(t testing.TB, name string, n int64, sum uint32) {
	t.Helper()
	if got := dataSum(t, name, n); got != sum {
		t.Errorf("the first %d bytes of %s are not what was written", n, name)
	}
}

// dataMustBeZero fails the test unless all bytes of a file or device from an
// offset on are zero. It gives how many there were.
func dataMustBeZero(t testing.TB, name string, offset int64) (n int64) {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	_, err = f.Seek(offset, io.SeekStart)
	dataMust(t, err)
	buf, zeros := make([]byte, dataMiB), make([]byte, dataMiB)
	for {
		got, err := io.ReadFull(f, buf)
		if !bytes.Equal(buf[:got], zeros[:got]) {
			t.Fatalf("%s is not zero within %d bytes of %d", name, got, offset+n)
		}
		n += int64(got)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return n
		}
		dataMust(t, err)
	}
}

// dataDeviceSize is the size of a block device in bytes.
func dataDeviceSize(t testing.TB, name string) int64 {
	t.Helper()
	f, err := os.Open(name)
	dataMust(t, err)
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	dataMust(t, err)
	return size
}

// dataSpan is how much a published volume offers, in bytes: the size of the
// device, or of the filesystem without what it needs for itself.
func dataSpan(t testing.TB, kind dataKind, target string) int64 {
	t.Helper()
	if kind.isBlock() {
		return dataDeviceSize(t, target)
	}
	var st unix.Statfs_t
	dataMust(t, unix.Statfs(target, &st))
	return int64(st.Blocks) * st.Frsize
}

// dataMustSpan fails the test unless a published volume offers size bytes: a
// device all of them, a filesystem nearly all. An XFS of less than 1 GiB does
// not count the 64 MiB of its log.
func dataMustSpan(t testing.TB, kind dataKind, target string, size int64) {
	t.Helper()
	least := size * 85 / 100
	switch kind.name {
	case "block":
		least = size
	case "xfs":
		least -= 64 * dataMiB
	}
	if got := dataSpan(t, kind, target); got > size || got < least {
		t.Errorf("%s offers %d bytes of %d", target, got, size)
	}
}

// dataMustBeCleanAsCut is dataMustBeClean for the image of a copy that was never
// mounted. XFS is left out: it keeps in its log what was about to be freed, also
// when it is frozen, and its fsck wants that to be replayed by a mount first.
func dataMustBeCleanAsCut(t testing.TB, fsType, image string) {
	t.Helper()
	if fsType != "xfs" {
		dataMustBeClean(t, fsType, image)
	}
}

// dataMustBeClean fails the test if a filesystem, in an image file that nobody
// uses, is not consistent. Nothing is altered: fsck does not even replay a log.
func dataMustBeClean(t testing.TB, fsType, image string) {
	t.Helper()
	switch fsType {
	case "ext4":
		dataRun(t, "e2fsck", "-fn", image)
	case "xfs":
		dataRun(t, "xfs_repair", "-n", "-f", image)
	case "btrfs":
		dataRun(t, "btrfs", "check", "--readonly", image)
	}
}
