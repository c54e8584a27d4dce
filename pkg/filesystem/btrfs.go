package filesystem

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"golang.org/x/sys/unix"
)

// RenewUUID gives a copy of a filesystem an identity of its own, so that it can
// be mounted beside the one that it was copied from. Only btrfs needs that:
// the kernel refuses, or from Linux 6.7 renames for the time being (temp_fsid),
// a second btrfs of the same UUID. XFS is mounted nouuid, and ext4 does not
// care. A filesystem in use is ErrBusy, one whose superblock cannot be trusted
// is ErrDamaged; one of several devices, or with another checksum than Make can
// give it, is an error and left as it is. Nothing that was fsynced is lost,
// whether the copy was taken of a frozen filesystem or of a live one.
//
// It does what btrfstune -m does (the feature METADATA_UUID, Linux 5.0): the
// superblock gets a new UUID and keeps the old one beside it, as the one that
// the blocks of the trees carry. But it commits no transaction. btrfstune does,
// and leaves the pointer to the log tree in place; the log of a copy taken of a
// live filesystem, which has what was fsynced since the last commit, is then of
// the wrong generation, and the filesystem cannot be mounted any more
// ("failed to read log tree"; btrfs-progs 6.2). Here the log stays valid, and
// the next mount replays it.
func RenewUUID(ctx context.Context, device string, t Type) error {
	if t != Btrfs {
		return nil
	}
	return Patiently(ctx, func() error {
		_, err := within(ctx, "renew the UUID of "+device, func() (struct{}, error) {
			return struct{}{}, renewBtrfs(device)
		}, nil)
		return err
	})
}

// Where the copies of a btrfs superblock are, as far as the device reaches. The
// kernel mounts by the first.
const btrfsSuperOffset = 0x10000

var btrfsMirrors = []int64{64 << 20, 256 << 30, btrfsSuperOffset}

func renewBtrfs(device string) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_EXCL|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: it is mounted or held by something else", ErrBusy)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)

	sb, err := readBtrfsSuper(fd, btrfsSuperOffset)
	if err != nil {
		return err
	}
	if err := sb.checkRenewable(); err != nil {
		return err
	}
	fresh := make([]byte, 16)
	rand.Read(fresh)
	fresh[6], fresh[8] = fresh[6]&0x0f|0x40, fresh[8]&0x3f|0x80 // RFC 9562: random

	// The first superblock is the last to change: what happens before a
	// crash here does not show.
	old := string(sb.fsid())
	for _, offset := range btrfsMirrors {
		sb, err := readBtrfsSuper(fd, offset)
		if errors.Is(err, ErrNone) || err == nil && string(sb.fsid()) != old {
			continue // beyond the end of the device, or not a copy
		}
		if err != nil {
			return err
		}
		sb.renew(fresh)
		if _, err := unix.Pwrite(fd, sb, offset); err != nil {
			return err
		}
	}
	return unix.Fsync(fd)
}

// btrfsSuper is struct btrfs_super_block (linux/btrfs_tree.h), little-endian.
type btrfsSuper []byte

// readBtrfsSuper is ErrNone where there is no superblock, and ErrDamaged where
// its checksum is wrong.
func readBtrfsSuper(fd int, offset int64) (btrfsSuper, error) {
	sb := btrfsSuper(aligned(superBlock))
	n, err := unix.Pread(fd, sb, offset)
	if err != nil {
		return nil, err
	}
	if n < superBlock || !sb.validAt(offset) {
		return nil, ErrNone
	}
	sum, err := sb.checksum()
	if err != nil {
		return nil, err
	}
	if string(sb[:len(sum)]) != string(sum) {
		return nil, fmt.Errorf("%w: the superblock at byte %d has a wrong checksum", ErrDamaged, offset)
	}
	return sb, nil
}

func (sb btrfsSuper) validAt(offset int64) bool {
	return string(sb[0x40:0x48]) == "_BHRfS_M" && binary.LittleEndian.Uint64(sb[0x30:]) == uint64(offset)
}

func (sb btrfsSuper) fsid() []byte         { return sb[0x20:0x30] }
func (sb btrfsSuper) flags() uint64        { return binary.LittleEndian.Uint64(sb[0x38:]) }
func (sb btrfsSuper) totalBytes() uint64   { return binary.LittleEndian.Uint64(sb[0x70:]) }
func (sb btrfsSuper) devices() uint64      { return binary.LittleEndian.Uint64(sb[0x88:]) }
func (sb btrfsSuper) incompat() uint64     { return binary.LittleEndian.Uint64(sb[0xbc:]) }
func (sb btrfsSuper) metadataUUID() []byte { return sb[0x23b:0x24b] }

// checkRenewable refuses what a change of the UUID would have to reach further
// for than this device's superblock.
func (sb btrfsSuper) checkRenewable() error {
	if n := sb.devices(); n != 1 {
		return fmt.Errorf("the filesystem has %d devices, not one", n)
	}
	// The upper half: a seed device, or a change of UUID or checksum that
	// was begun and not finished.
	if flags := sb.flags(); flags>>32 != 0 {
		return fmt.Errorf("the superblock has the flags %#x", flags)
	}
	return nil
}

func (sb btrfsSuper) renew(fsid []byte) {
	const hasMetadataUUID = 1 << 10 // BTRFS_FEATURE_INCOMPAT_METADATA_UUID
	if features := sb.incompat(); features&hasMetadataUUID == 0 {
		copy(sb.metadataUUID(), sb.fsid())
		binary.LittleEndian.PutUint64(sb[0xbc:], features|hasMetadataUUID)
	}
	copy(sb.fsid(), fsid)
	sum, _ := sb.checksum() // its kind was checked when sb was read
	copy(sb[:32], sum)
}

// checksum knows the two kinds that the standard library has, and that
// ValidateOptions lets mkfs.btrfs use.
func (sb btrfsSuper) checksum() ([]byte, error) {
	body := sb[32:superBlock]
	switch kind := binary.LittleEndian.Uint16(sb[0xc4:]); kind {
	case 0:
		return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))), nil
	case 2:
		sum := sha256.Sum256(body)
		return sum[:], nil
	default:
		return nil, fmt.Errorf("checksum type %d is not supported, only crc32c and sha256", kind)
	}
}
