//go:build integration

package filesystem

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

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

		for _, first := range []bool{true, false} {
			grows, err := GrowsUnmounted(d.path, fs)
			must(t, err)
			if want := first && fs == Ext4 && !mayGrowMounted(); grows != want {
				t.Fatalf("there is something to do: %t, want %t", grows, want)
			}
			if grows {
				must(t, CheckWhole(soon(t), d.path))
				must(t, GrowUnmounted(soon(t), d.path))
			}
		}
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

// A growth that is killed, at whatever moment, is mended by Repair, and goes on
// then; nothing that the filesystem held is lost by it. Some such moments leave
// what Check takes for damage.
func TestAGrowthThatIsKilledIsRepaired(t *testing.T) {
	const files = 40
	original := made(t, Ext4, roomy)
	target := original.mounted(t, Ext4)
	for i := range files {
		write(t, filepath.Join(target, strconv.Itoa(i)), strings.Repeat(strconv.Itoa(i), 3000*i))
	}
	must(t, Unmount(soon(t), target))
	damaged, cutOff := 0, 0
	for after := 500 * time.Microsecond; ; after += 500 * time.Microsecond {
		d := original.copy(t)
		d.resize(t, 4*gib)
		must(t, CheckWhole(soon(t), d.path))

		ctx, cancel := context.WithTimeout(t.Context(), after)
		grown := run(ctx, 0, "resize2fs", d.path)
		cancel()
		if err := Check(soon(t), d.path, Ext4); errors.Is(err, ErrDamaged) {
			damaged++
		} else {
			must(t, err)
		}
		if grown != nil {
			cutOff++
			must(t, Repair(soon(t), d.path))
			must(t, GrowUnmounted(soon(t), d.path))
		}
		target := d.mounted(t, Ext4)
		for i := range files {
			wantFile(t, filepath.Join(target, strconv.Itoa(i)), strings.Repeat(strconv.Itoa(i), 3000*i))
		}
		usage, err := Stat(soon(t), target)
		must(t, err)
		if usage.Bytes.Total < 4*gib/10*9 {
			t.Errorf("killed after %s, and grown again, it can hold %d bytes of %d", after, usage.Bytes.Total, 4*gib)
		}
		must(t, Unmount(soon(t), target))
		d.wantSound(t, Ext4)
		if grown == nil {
			break
		}
	}
	t.Logf("killed %d times; %d were more than e2fsck -p mends", cutOff, damaged)
	if damaged == 0 {
		t.Error("no kill left anything to repair: the test shows nothing")
	}
}

// Without the capability, what is mounted stays as it is and says why.
func TestGrowOfMountedExt4TakesACapability(t *testing.T) {
	d := made(t, Ext4, roomy)
	target := d.mounted(t, Ext4)
	must(t, Grow(soon(t), target)) // nothing to do takes none
	d.resize(t, 2*roomy)
	err := Grow(soon(t), target)
	if mayGrowMounted() {
		must(t, err)
		return
	}
	wantError(t, err, unix.EPERM, "CAP_SYS_RESOURCE")
}
