package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
)

// Filesystem makes a disk of that many bytes with a filesystem (ext4, xfs or
// btrfs, as its mkfs makes it without options), and gives the directory where
// it is mounted. At the test's end everything in it is unmounted and detached,
// and then it is itself.
func Filesystem(t testing.TB, fsType string, size int64) string {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Clean(t, base) })
	disk, dir := filepath.Join(base, "disk"), filepath.Join(base, "mount")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	device, err := loop.Attach(f, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs."+fsType, "-q", device.Path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v\n%s", fsType, err, out)
	}
	if err := filesystem.Mount(t.Context(), device.Path, dir, filesystem.Type(fsType), nil, false); err != nil {
		t.Fatal(err)
	}
	return dir
}

// In gives the driver to a subtest, so that what fails there fails that. A
// subtest must not start or stop the driver.
func (d *Driver) In(t testing.TB) *Driver {
	sub := *d
	sub.t = t
	return &sub
}
