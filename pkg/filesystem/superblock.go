package filesystem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Info is what a superblock says about its filesystem.
type Info struct {
	Type   Type
	UUID   string // lower case, with dashes
	Size   int64  // bytes of the device that the filesystem spans
	Label  string // XFS only
	Errors bool   // ext4 only: the kernel found it inconsistent, and it needs Check
}

// Probe reads the superblocks on a device. It is ErrNone if there is none of
// the three filesystems; that is no proof that the device is blank. A device
// that has more than one of them is an error. Of a mounted filesystem it may
// tell what was true a moment ago.
func Probe(device string) (Info, error) {
	head, err := readHead(device)
	if err != nil {
		return Info{}, fmt.Errorf("probe %s: %w", device, err)
	}
	info, err := decode(head)
	if err != nil {
		return Info{}, fmt.Errorf("probe %s: %w", device, err)
	}
	return info, nil
}

const (
	superBlock = 4096             // reserved for a superblock by the largest of the three
	headSize   = 0x10000 + 0x1000 // up to the end of the farthest superblock
)

// readHead reads past the page cache: XFS writes its superblock past it too, so
// that what is cached there is older than what is on the device.
func readHead(device string) ([]byte, error) {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	head := aligned(headSize)
	n, err := unix.Pread(fd, head, 0)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("it is empty; is anything attached to it?")
	}
	return head[:n], nil
}

// aligned makes a buffer for direct I/O, which must begin at a multiple of the
// device's logical block size.
func aligned(size int) []byte {
	b := make([]byte, size+superBlock)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (superBlock - 1)
	return b[skip : skip+size]
}

// decode finds the filesystem in the first bytes of a device.
func decode(head []byte) (Info, error) {
	var found []Info
	for _, one := range []func([]byte) (Info, bool){decodeExt4, decodeXFS, decodeBtrfs} {
		if info, ok := one(head); ok {
			found = append(found, info)
		}
	}
	switch len(found) {
	case 0:
		return Info{}, ErrNone
	case 1:
		return found[0], nil
	}
	return Info{}, fmt.Errorf("it has the superblocks of both %s and %s", found[0].Type, found[1].Type)
}

// decodeExt4 reads struct ext4_super_block, at byte 1024 (kernel
// documentation, filesystems/ext4/super). ext2 and ext3 are ext4 here, as they
// are to the kernel; a journal device is no filesystem.
func decodeExt4(head []byte) (Info, bool) {
	const (
		needsJournalDevice = 0x8  // s_feature_incompat: INCOMPAT_JOURNAL_DEV
		has64bit           = 0x80 // s_feature_incompat: INCOMPAT_64BIT
		errorFlag          = 0x2  // s_state: EXT4_ERROR_FS
		largestLogBlock    = 6    // 64 KiB
	)
	if len(head) < 2048 {
		return Info{}, false
	}
	sb, le := head[1024:2048], binary.LittleEndian
	blocks, logBlock, incompat := uint64(le.Uint32(sb[0x4:])), le.Uint32(sb[0x18:]), le.Uint32(sb[0x60:])
	if le.Uint16(sb[0x38:]) != 0xEF53 || logBlock > largestLogBlock || incompat&needsJournalDevice != 0 {
		return Info{}, false
	}
	if incompat&has64bit != 0 {
		blocks |= uint64(le.Uint32(sb[0x150:])) << 32
	}
	size, ok := span(blocks, 1024<<logBlock)
	return Info{
		Type:   Ext4,
		UUID:   formatUUID(sb[0x68:]),
		Size:   size,
		Errors: le.Uint16(sb[0x3A:])&errorFlag != 0,
	}, ok
}

// decodeXFS reads struct xfs_dsb, at byte 0 (XFS Algorithms & Data Structures,
// "Superblocks").
func decodeXFS(head []byte) (Info, bool) {
	if len(head) < 512 || string(head[:4]) != "XFSB" {
		return Info{}, false
	}
	be := binary.BigEndian
	block := be.Uint32(head[4:])
	if block < 512 || block > 65536 || bits.OnesCount32(block) != 1 {
		return Info{}, false
	}
	size, ok := span(be.Uint64(head[8:]), uint64(block))
	label, _, _ := strings.Cut(string(head[108:120]), "\x00") // sb_fname
	return Info{Type: XFS, UUID: formatUUID(head[32:]), Size: size, Label: label}, ok
}

// decodeBtrfs reads the first copy of the superblock; the others are only for
// rescue.
func decodeBtrfs(head []byte) (Info, bool) {
	if len(head) < btrfsSuperOffset+superBlock {
		return Info{}, false
	}
	sb := btrfsSuper(head[btrfsSuperOffset:])
	if !sb.validAt(btrfsSuperOffset) {
		return Info{}, false
	}
	size, ok := span(sb.totalBytes(), 1)
	return Info{Type: Btrfs, UUID: formatUUID(sb.fsid()), Size: size}, ok
}

// span is the length of a filesystem in bytes, if it can be true.
func span(blocks, blockSize uint64) (int64, bool) {
	high, low := bits.Mul64(blocks, blockSize)
	return int64(low), high == 0 && low > 0 && low <= math.MaxInt64
}

func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}
