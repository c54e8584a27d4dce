//go:build integration

package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMakeThenProbe(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := newDevice(t, roomy)
		_, err := Probe(d.path)
		wantError(t, err, ErrNone)

		must(t, Make(soon(t), d.path, fs, nil))
		info, err := Probe(d.path)
		must(t, err)
		if info.Type != fs || info.Size != roomy || info.Errors || len(info.UUID) != 36 {
			t.Errorf("Probe: %+v", info)
		}
		if again, err := Probe(made(t, fs, roomy).path); err != nil || again.UUID == info.UUID {
			t.Errorf("two filesystems have the UUID %s (%v)", info.UUID, err)
		}
	})
}

func TestProbeOfNoDevice(t *testing.T) {
	d := newDevice(t, 0)
	if _, err := Probe(d.path); err == nil || errors.Is(err, ErrNone) {
		t.Errorf("an empty device: %v", err)
	}
	_, err := Probe("/dev/no-such-device")
	wantError(t, err, unix.ENOENT, "/dev/no-such-device")
}

// A smaller device is refused, gets an ext4 without a journal, or a btrfs that
// cannot be grown.
func TestMinSizeIsTheSmallestThatCanBeUsed(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, fs.MinSize())
		target := d.mounted(t, fs)
		usage, err := Stat(soon(t), target)
		must(t, err)

		// Fill it with files, and find them again.
		content := bytes.Repeat([]byte("orlop "), 10_000)
		files := 0
		for {
			err = os.WriteFile(filepath.Join(target, fmt.Sprint(files)), content, 0o600)
			if err != nil {
				break
			}
			files++
		}
		wantError(t, err, unix.ENOSPC)
		must(t, Unmount(soon(t), target))
		d.wantSound(t, fs)
		must(t, Mount(soon(t), d.path, target, fs, nil, false))
		for i := range files {
			wantFile(t, filepath.Join(target, fmt.Sprint(i)), string(content))
		}
		held := int64(files) * int64(len(content))
		t.Logf("%d MiB hold %.1f MiB of files; statfs promised %.1f", fs.MinSize()/mib, float64(held)/float64(mib), float64(usage.Bytes.Available)/float64(mib))
		if held < fs.MinSize()/4 {
			t.Errorf("%d bytes hold only %d bytes of files", fs.MinSize(), held)
		}

		smaller := newDevice(t, fs.MinSize()-4096)
		err = Make(soon(t), smaller.path, fs, nil)
		switch fs {
		case XFS:
			wantError(t, err, nil, "mkfs.xfs")
		case Ext4:
			if hasJournal(t, smaller) || !hasJournal(t, d) {
				t.Errorf("the journal does not begin at MinSize (%v)", err)
			}
		case Btrfs:
			must(t, err)
			must(t, Grow(soon(t), target))
			wantError(t, Grow(soon(t), smaller.mounted(t, fs)), unix.EINVAL)
		}
	})
}

func hasJournal(t *testing.T, d device) bool {
	head, err := readHead(d.path)
	must(t, err)
	return head[1024+0x5c]&0x4 != 0 // s_feature_compat, COMPAT_HAS_JOURNAL
}

// mke2fs heeds only the last -E: the user's must not switch off that nothing is
// zeroed, nor the other way round.
func TestMakeJoinsExtendedOptions(t *testing.T) {
	plain := made(t, Ext4, gib)
	strided := made(t, Ext4, gib, "-E", "stride=16", "-E", "stripe_width=32")
	head, err := readHead(strided.path)
	must(t, err)
	if stride, width := head[1024+0x164], head[1024+0x170]; stride != 16 || width != 32 {
		t.Errorf("stride %d, stripe width %d", stride, width)
	}
	if a, b := plain.allocated(t), strided.allocated(t); a > 4*mib || b > 4*mib {
		t.Errorf("%d and %d bytes were written to the images", a, b)
	}
}

func (d device) allocated(t *testing.T) int64 {
	t.Helper()
	var stat unix.Stat_t
	must(t, unix.Stat(d.image, &stat))
	return stat.Blocks * 512
}

func TestMakeDiscardsNothing(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := newDevice(t, roomy)
		file, err := os.OpenFile(d.image, os.O_RDWR, 0)
		must(t, err)
		must(t, unix.Fallocate(int(file.Fd()), 0, 0, roomy))
		must(t, file.Close())
		must(t, Make(soon(t), d.path, fs, nil))
		if got := d.allocated(t); got < roomy {
			t.Errorf("%d of %d bytes are left of a thick image", got, roomy)
		}
	})
}

func TestMakeOptionsOfTheUserWin(t *testing.T) {
	d := made(t, Ext4, roomy, "-b1024", "-m", "5", "-L", "words")
	target := d.mounted(t, Ext4)
	var s unix.Statfs_t
	must(t, unix.Statfs(target, &s))
	if s.Bsize != 1024 || s.Bavail == s.Bfree {
		t.Errorf("block size %d, free %d, available %d", s.Bsize, s.Bfree, s.Bavail)
	}
}

func TestMakeTellsWhatTheToolSaid(t *testing.T) {
	d := newDevice(t, roomy)
	wantError(t, Make(soon(t), d.path, Ext4, []string{"-i", "1"}), nil, "mkfs.ext4", "invalid inode ratio 1")
	wantError(t, Make(soon(t), d.path, XFS, []string{"-m", "foo=1"}), nil, "mkfs.xfs", "unknown option -m foo=1")
	wantError(t, Make(soon(t), d.path, Btrfs, []string{"-n", "12345"}), nil, "mkfs.btrfs", "12345")
	wantError(t, Make(soon(t), d.path, Ext4, []string{"-J", "device=loop0"}), ErrOption)
}

func TestMakeWithoutTheTool(t *testing.T) {
	d := newDevice(t, roomy)
	t.Setenv("PATH", t.TempDir())
	wantError(t, Make(soon(t), d.path, Ext4, nil), nil, "mkfs.ext4", "not installed", "e2fsprogs")
	wantError(t, Make(soon(t), d.path, XFS, nil), nil, "mkfs.xfs", "not installed", "xfsprogs")
	wantError(t, Make(soon(t), d.path, Btrfs, nil), nil, "mkfs.btrfs", "not installed", "btrfs-progs")
}

func TestMakeIsKilledWhenItsContextEnds(t *testing.T) {
	d := newDevice(t, 512*gib)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	// Gigabytes of inode tables to write.
	err := Make(ctx, d.path, Ext4, []string{"-E", "assume_storage_prezeroed=0,lazy_itable_init=0"})
	wantError(t, err, context.DeadlineExceeded, "mkfs.ext4")

	if !d.idle() {
		t.Error("mkfs is given up, but not gone: it holds the device")
	}
}

func TestCheckRepairsWhatTheKernelMarked(t *testing.T) {
	d := made(t, Ext4, roomy)
	target := d.mounted(t, Ext4)
	write(t, filepath.Join(target, "file"), "kept")
	// The kernel's own way to mark a filesystem: ext4 in admin-guide.
	must(t, os.WriteFile("/sys/fs/ext4/"+filepath.Base(d.path)+"/trigger_fs_error", []byte("test\n"), 0))

	must(t, Unmount(soon(t), target))
	tool(t, "debugfs", "-w", "-R", "set_super_value free_blocks_count 7", d.path)
	if info, err := Probe(d.path); err != nil || !info.Errors {
		t.Fatalf("before: %+v, %v", info, err)
	}
	must(t, Check(soon(t), d.path, Ext4))
	if info, err := Probe(d.path); err != nil || info.Errors {
		t.Fatalf("after: %+v, %v", info, err)
	}
	d.wantSound(t, Ext4)
	must(t, Mount(soon(t), d.path, target, Ext4, nil, false))
	wantFile(t, filepath.Join(target, "file"), "kept")
}

func TestCheckNeverTouchesAMountedFilesystem(t *testing.T) {
	d := made(t, Ext4, roomy)
	tool(t, "debugfs", "-w", "-R", "set_super_value state 2", d.path)
	d.mounted(t, Ext4)
	wantError(t, Check(soon(t), d.path, Ext4), nil, "e2fsck", "is mounted")
	if info, err := Probe(d.path); err != nil || !info.Errors {
		t.Errorf("after: %+v, %v", info, err)
	}
}

func TestCheckLeavesRealDamageToAHuman(t *testing.T) {
	d := made(t, Ext4, roomy)
	tool(t, "debugfs", "-w", "-R", "clri <2>", d.path) // the root directory
	must(t, Check(soon(t), d.path, Ext4))              // nobody has marked it
	wantError(t, CheckWhole(soon(t), d.path), ErrDamaged, "e2fsck", "RUN fsck MANUALLY")
	tool(t, "debugfs", "-w", "-R", "set_super_value state 2", d.path)
	wantError(t, Check(soon(t), d.path, Ext4), ErrDamaged, "e2fsck", "RUN fsck MANUALLY")
}

func TestCheckOfWhatNeedsNone(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := d.mounted(t, fs)
		write(t, filepath.Join(target, "file"), "in the log")
		crashed := d.copy(t)
		must(t, Check(soon(t), crashed.path, fs))
	})
}
