//go:build integration

package filesystem

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

// What was fsynced since the last commit is in the log tree only.
func TestRenewUUIDKeepsWhatWasFsynced(t *testing.T) {
	for _, checksum := range []string{"crc32c", "sha256"} {
		t.Run(checksum, func(t *testing.T) {
			d := made(t, Btrfs, roomy, "--csum", checksum)
			source := d.mounted(t, Btrfs)
			write(t, filepath.Join(source, "file"), "precious")
			crashed := d.copy(t)
			if !hasLogTree(t, crashed) {
				t.Fatal("the copy has no log tree: this test tests nothing")
			}
			before, err := Probe(crashed.path)
			must(t, err)
			must(t, RenewUUID(soon(t), crashed.path, Btrfs))
			after, err := Probe(crashed.path)
			must(t, err)
			if after.UUID == before.UUID || after.Size != before.Size {
				t.Errorf("before: %+v; after: %+v", before, after)
			}
			tool(t, "btrfs", "inspect-internal", "dump-super", "-a", crashed.path)

			target := crashed.mounted(t, Btrfs)
			if _, err := os.Stat("/sys/fs/btrfs/" + after.UUID + "/devices/" + filepath.Base(crashed.path)); err != nil {
				t.Errorf("it is not mounted by its own UUID: %v", err)
			}
			wantFile(t, filepath.Join(target, "file"), "precious")
			write(t, filepath.Join(target, "file"), "of the copy")
			again := crashed.copy(t) // with a log tree, and a UUID that is not its blocks'
			if !hasLogTree(t, again) {
				t.Fatal("the second copy has no log tree")
			}
			must(t, RenewUUID(soon(t), again.path, Btrfs))
			second := again.mounted(t, Btrfs)
			wantFile(t, filepath.Join(second, "file"), "of the copy")
			wantFile(t, filepath.Join(source, "file"), "precious")

			for path, d := range map[string]device{source: d, target: crashed, second: again} {
				must(t, Unmount(soon(t), path))
				d.wantSound(t, Btrfs)
			}
		})
	}
}

func hasLogTree(t *testing.T, d device) bool {
	t.Helper()
	head, err := readHead(d.path)
	must(t, err)
	return binary.LittleEndian.Uint64(head[btrfsSuperOffset+0x60:]) != 0 // log_root
}

func TestRenewUUIDReachesEveryCopyOfTheSuperblock(t *testing.T) {
	d := made(t, Btrfs, 300*gib)
	must(t, RenewUUID(soon(t), d.path, Btrfs))
	info, err := Probe(d.path)
	must(t, err)
	for mirror := range 3 {
		out := tool(t, "btrfs", "inspect-internal", "dump-super", "-s", string(rune('0'+mirror)), d.path)
		wantWords(t, out, "[match]", info.UUID)
	}
	d.wantSound(t, Btrfs)
}

func TestRenewUUIDRefuses(t *testing.T) {
	t.Run("what is mounted", func(t *testing.T) {
		d := made(t, Btrfs, roomy)
		d.mounted(t, Btrfs)
		wantError(t, RenewUUID(soon(t), d.path, Btrfs), ErrBusy, d.path)
	})
	t.Run("a superblock with a wrong checksum", func(t *testing.T) {
		d := made(t, Btrfs, roomy)
		file, err := os.OpenFile(d.path, os.O_RDWR, 0)
		must(t, err)
		_, err = file.WriteAt([]byte{0xff}, btrfsSuperOffset+0x200)
		must(t, err)
		must(t, file.Close())
		wantError(t, RenewUUID(soon(t), d.path, Btrfs), ErrDamaged, "checksum")
	})
	t.Run("a checksum that it cannot make", func(t *testing.T) {
		d := newDevice(t, roomy)
		tool(t, "mkfs.btrfs", "-q", "--csum", "xxhash", d.path)
		wantError(t, RenewUUID(soon(t), d.path, Btrfs), nil, "checksum type 1")
	})
	t.Run("one of two devices", func(t *testing.T) {
		first, second := newDevice(t, roomy), newDevice(t, roomy)
		tool(t, "mkfs.btrfs", "-q", "-f", first.path, second.path)
		wantError(t, RenewUUID(soon(t), first.path, Btrfs), nil, "2 devices")
	})
	t.Run("what is no btrfs", func(t *testing.T) {
		wantError(t, RenewUUID(soon(t), newDevice(t, roomy).path, Btrfs), ErrNone)
	})
}
