package filesystem

import (
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"
)

var uuid = []byte("\x06\x64\x07\xfe\x89\x6a\x4d\x0e\xba\x41\x91\x97\x56\xf1\x80\x7c")

const uuidText = "066407fe-896a-4d0e-ba41-919756f1807c"

// The least that makes a superblock. Those that the real mkfs writes are in the
// integration tests.
func ext4Head(blocks uint64, logBlock, incompat uint32, state uint16) []byte {
	head, le := make([]byte, headSize), binary.LittleEndian
	sb := head[1024:]
	le.PutUint32(sb[0x4:], uint32(blocks))
	le.PutUint32(sb[0x150:], uint32(blocks>>32))
	le.PutUint32(sb[0x18:], logBlock)
	le.PutUint16(sb[0x38:], 0xEF53)
	le.PutUint16(sb[0x3A:], state)
	le.PutUint32(sb[0x60:], incompat)
	copy(sb[0x68:], uuid)
	return head
}

func xfsHead(blocks uint64, blockSize uint32) []byte {
	head, be := make([]byte, headSize), binary.BigEndian
	copy(head, "XFSB")
	be.PutUint32(head[4:], blockSize)
	be.PutUint64(head[8:], blocks)
	copy(head[32:], uuid)
	return head
}

func btrfsHead(size uint64) []byte {
	head, le := make([]byte, headSize), binary.LittleEndian
	sb := head[btrfsSuperOffset:]
	copy(sb[0x20:], uuid)
	le.PutUint64(sb[0x30:], btrfsSuperOffset)
	copy(sb[0x40:], "_BHRfS_M")
	le.PutUint64(sb[0x70:], size)
	return head
}

func TestDecode(t *testing.T) {
	const has64bit = 0x80
	for _, test := range []struct {
		name string
		head []byte
		want Info
		err  string
	}{
		{"ext4", ext4Head(1000, 2, has64bit, 1), Info{Type: Ext4, Size: 4096000}, ""},
		{"ext4 with errors", ext4Head(1000, 2, has64bit, 3), Info{Type: Ext4, Size: 4096000, Errors: true}, ""},
		{"ext4 of 32 TiB", ext4Head(1<<33, 2, has64bit, 1), Info{Type: Ext4, Size: 1 << 45}, ""},
		{"ext4 without 64bit", ext4Head(1<<33|7, 0, 0, 1), Info{Type: Ext4, Size: 7168}, ""},
		{"ext4's journal device", ext4Head(1000, 2, 0x8, 1), Info{}, "no ext4"},
		{"ext4 of no blocks", ext4Head(0, 2, has64bit, 1), Info{}, "no ext4"},
		{"ext4 of too many", ext4Head(math.MaxUint64, 6, has64bit, 1), Info{}, "no ext4"},
		{"ext4 of huge blocks", ext4Head(1000, 32, has64bit, 1), Info{}, "no ext4"},
		{"XFS", xfsHead(1000, 4096), Info{Type: XFS, Size: 4096000}, ""},
		{"XFS of odd blocks", xfsHead(1000, 4097), Info{}, "no ext4"},
		{"XFS of too many", xfsHead(math.MaxUint64, 4096), Info{}, "no ext4"},
		{"btrfs", btrfsHead(12345678), Info{Type: Btrfs, Size: 12345678}, ""},
		{"btrfs of too much", btrfsHead(1 << 63), Info{}, "no ext4"},
		{"zeros", make([]byte, headSize), Info{}, "no ext4"},
		{"nothing", nil, Info{}, "no ext4"},
		{"the first half of ext4", ext4Head(1000, 2, 0, 1)[:1024+512], Info{}, "no ext4"},
		{"all but the end of btrfs", btrfsHead(12345678)[:headSize-1], Info{}, "no ext4"},
		{"ext4 and XFS", both(ext4Head(1000, 2, 0, 1), xfsHead(1000, 4096)), Info{}, "both ext4 and xfs"},
		{"ext4 and btrfs", both(ext4Head(1000, 2, 0, 1), btrfsHead(12345678)), Info{}, "both ext4 and btrfs"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := decode(test.head)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %+v, %v; want an error with %q", got, err, test.err)
				}
				return
			}
			test.want.UUID = uuidText
			if err != nil || got != test.want {
				t.Errorf("got %+v, %v; want %+v", got, err, test.want)
			}
		})
	}
}

func both(a, b []byte) []byte {
	for i := range a {
		a[i] |= b[i]
	}
	return a
}

func FuzzDecode(f *testing.F) {
	for _, head := range [][]byte{ext4Head(1000, 2, 0x80, 1), xfsHead(1000, 4096), btrfsHead(12345678)} {
		f.Add(head[:2048], head[btrfsSuperOffset:])
	}
	f.Fuzz(func(t *testing.T, start, end []byte) {
		head := make([]byte, headSize)
		copy(head[btrfsSuperOffset:], end)
		copy(head[:btrfsSuperOffset], start)
		for _, head := range [][]byte{start, head} {
			info, err := decode(head)
			if err == nil && (info.Size <= 0 || len(info.UUID) != len(uuidText) || info.Type == "") {
				t.Errorf("%+v", info)
			}
			if errors.Is(err, ErrNone) && info != (Info{}) {
				t.Errorf("%+v, %v", info, err)
			}
		}
	})
}

// The superblock stays one that the kernel takes, and the blocks of the trees
// keep the UUID that they carry.
func TestRenewKeepsTheUUIDOfTheTrees(t *testing.T) {
	sb := btrfsSuper(btrfsHead(12345678)[btrfsSuperOffset:])
	for _, fresh := range []string{"first fresh uuid", "second one of 16"} {
		sb.renew([]byte(fresh))
		if string(sb.fsid()) != fresh || string(sb.metadataUUID()) != string(uuid) || sb.incompat() != 1<<10 {
			t.Errorf("fsid %q, metadata UUID %q, features %#x", sb.fsid(), sb.metadataUUID(), sb.incompat())
		}
		if sum, err := sb.checksum(); err != nil || string(sb[:len(sum)]) != string(sum) {
			t.Errorf("the checksum is %x, not %x (%v)", sb[:4], sum, err)
		}
	}
}
