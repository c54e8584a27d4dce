//go:build integration

package filesystem

import (
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Where the kernel lets ext4 grow while it is mounted, it is left to Grow; where
// not, the filesystem spans its device before it is mounted. Either way it does
// after both.
func TestGrowUnmountedThenGrow(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := d.mounted(t, fs)
		write(t, filepath.Join(target, "before"), "before")
		must(t, Unmount(soon(t), target))
		d.resize(t, 2*gib)

		must(t, GrowUnmounted(soon(t), d.path, fs))
		must(t, GrowUnmounted(soon(t), d.path, fs))
		must(t, Mount(soon(t), d.path, target, fs, nil, false))
		must(t, Grow(soon(t), target))
		wantFile(t, filepath.Join(target, "before"), "before")
		usage, err := Stat(soon(t), target)
		must(t, err)
		if usage.Bytes.Total < 2*gib/10*9 {
			t.Errorf("it can hold %d bytes of %d", usage.Bytes.Total, 2*gib)
		}
		must(t, Unmount(soon(t), target))
		d.wantSound(t, fs)
	})
}

// Without the capability, what is mounted stays as it is and says why.
func TestGrowOfMountedExt4TakesACapability(t *testing.T) {
	d := made(t, Ext4, roomy)
	target := d.mounted(t, Ext4)
	must(t, Grow(soon(t), target)) // nothing to do takes none
	d.resize(t, 2*roomy)
	err := Grow(soon(t), target)
	if hasCapability(unix.CAP_SYS_RESOURCE) {
		must(t, err)
		return
	}
	wantError(t, err, unix.EPERM, "CAP_SYS_RESOURCE")
}
