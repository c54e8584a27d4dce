//go:build integration

package integration

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// changedBlock is the block of the pools' filesystems, bytes.
const changedBlock = 4096

// changedKinds are small volumes, so that a round is short: snapshots of an XFS
// and a btrfs cannot be.
var changedKinds = []dataKind{
	{"block", 16 * dataMiB, harness.Block(harness.Writer)},
	{"ext4", 24 * dataMiB, harness.Mount("ext4", harness.Writer)},
	{"xfs", 320 * dataMiB, harness.Mount("xfs", harness.Writer)},
	{"btrfs", 256 * dataMiB, harness.Mount("btrfs", harness.Writer)},
}

// A volume is used at random, and snapshots of it come and go. Between any two
// that exist, every byte that differs is in a range that the driver tells; and
// everything that is not zero is in one that it calls allocated.
func TestChangedBlocksAreNeverMissed(t *testing.T) {
	for _, kind := range changedKinds {
		t.Run(kind.name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			d := harness.Start(t, harness.FilePool("8Gi"))
			id := d.Create("volume", kind.size, kind.capability).GetVolumeId()
			use := changedUser(t, kind, d.Use("volume", id, kind.capability), r)

			var kept []changedSnapshot
			var differing, told int64
			for round := range dataRounds(t, 15) {
				for range r.IntN(8) { // or nothing at all
					use()
				}
				target := changedCut(t, d, fmt.Sprintf("s-%d", round), id)
				target.mustHold(t, d)
				for _, base := range kept {
					a, b := changedMustFind(t, d, base, target, r)
					differing, told = differing+a, told+b
				}
				kept = append(kept, target)
				for len(kept) > 3 { // also from the middle of a chain
					i := r.IntN(len(kept))
					_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: kept[i].GetSnapshotId()})
					dataMust(t, err)
					kept[i].unmap()
					kept = slices.Delete(kept, i, i+1)
				}
				if t.Failed() {
					return
				}
			}
			if differing == 0 {
				t.Error("nothing ever differed: the test shows nothing")
			}
			t.Logf("%d blocks differed, %d were told", differing, told)
		})
	}
}

// changedSnapshot is a snapshot and its bytes.
type changedSnapshot struct {
	*csi.Snapshot

	image []byte
	unmap func()
}

func changedCut(t *testing.T, d *harness.Driver, name, volumeID string) changedSnapshot {
	t.Helper()
	s := d.Snapshot(name, volumeID)
	f, err := os.Open(filepath.Join(dataPool(d), "snapshots", path.Base(s.GetSnapshotId()), "data"))
	dataMust(t, err)
	defer f.Close()
	image, err := unix.Mmap(int(f.Fd()), 0, int(s.GetSizeBytes()), unix.PROT_READ, unix.MAP_SHARED)
	dataMust(t, err)
	unmap := sync.OnceFunc(func() { _ = unix.Munmap(image) })
	t.Cleanup(unmap)
	return changedSnapshot{s, image, unmap}
}

// block gives a block's bytes; those behind the end are zeros.
func (s changedSnapshot) block(i int) []byte {
	if i*changedBlock >= len(s.image) {
		return changedZeros[:]
	}
	return s.image[i*changedBlock : (i+1)*changedBlock]
}

var changedZeros [changedBlock]byte

// changedBits tells for each block whether it is in a range.
func changedBits(m harness.Metadata) []bool {
	bits := make([]bool, (m.Capacity+changedBlock-1)/changedBlock)
	for _, r := range m.Ranges {
		for i := r.GetByteOffset() / changedBlock; i*changedBlock < r.GetByteOffset()+r.GetSizeBytes(); i++ {
			bits[i] = true
		}
	}
	return bits
}

// mustHold fails the test if a snapshot has a byte that is not zero and not in a
// range that is called allocated.
func (s changedSnapshot) mustHold(t *testing.T, d *harness.Driver) {
	t.Helper()
	got, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: s.GetSnapshotId()})
	dataMust(t, err)
	if got.Capacity != s.GetSizeBytes() {
		t.Errorf("capacity %d of %d", got.Capacity, s.GetSizeBytes())
	}
	for i, in := range changedBits(got) {
		if !in && !bytes.Equal(s.block(i), changedZeros[:]) {
			t.Fatalf("%s: block %d holds data and is not called allocated", s.GetSnapshotId(), i)
		}
	}
}

// changedMustFind fails the test if a block differs between two snapshots and is
// in no range, or if a stream that is taken up anywhere tells something else.
func changedMustFind(t *testing.T, d *harness.Driver, base, target changedSnapshot, r *rand.Rand) (differing, told int64) {
	t.Helper()
	request := &csi.GetMetadataDeltaRequest{BaseSnapshotId: base.GetSnapshotId(), TargetSnapshotId: target.GetSnapshotId()}
	got, err := d.Delta(request)
	dataMust(t, err)
	for i, in := range changedBits(got) {
		if in {
			told++
		}
		if bytes.Equal(base.block(i), target.block(i)) {
			continue
		}
		if differing++; !in {
			t.Fatalf("from %s to %s: block %d differs and is not told", base.GetSnapshotId(), target.GetSnapshotId(), i)
		}
	}
	request.StartingOffset, request.MaxResults = r.Int64N(got.Capacity+1), int32(r.IntN(5))
	rest, err := d.Delta(request)
	dataMust(t, err)
	if want := changedFrom(got.Ranges, request.GetStartingOffset()); !slices.Equal(changedText(rest.Ranges), changedText(want)) {
		t.Errorf("from %d on: %v, want %v", request.GetStartingOffset(), rest.Ranges, want)
	}
	return differing, told
}

// changedFrom is what is left of ranges from an offset on.
func changedFrom(ranges []*csi.BlockMetadata, from int64) (rest []*csi.BlockMetadata) {
	for _, r := range ranges {
		begin, end := max(from, r.GetByteOffset()), r.GetByteOffset()+r.GetSizeBytes()
		if begin < end {
			rest = append(rest, &csi.BlockMetadata{ByteOffset: begin, SizeBytes: end - begin})
		}
	}
	return rest
}

func changedText(ranges []*csi.BlockMetadata) (text []string) {
	for _, r := range ranges {
		text = append(text, fmt.Sprintf("%d+%d", r.GetByteOffset(), r.GetSizeBytes()))
	}
	return text
}

// changedUser gives a function that does one thing, at random, to a published
// volume.
func changedUser(t *testing.T, kind dataKind, target string, r *rand.Rand) func() {
	t.Helper()
	data, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	dataMust(t, err)
	t.Cleanup(func() { _ = unix.Munmap(data) })
	fill := func(n int64) []byte {
		if r.IntN(8) == 0 {
			clear(data[:n]) // zeros can be written, too
			return data[:n]
		}
		for i := range data[:n] {
			data[i] = byte(r.Uint32())
		}
		return data[:n]
	}
	if kind.isBlock() {
		return func() { changedDevice(t, target, kind.size, r, fill) }
	}
	return func() { changedFiles(t, target, r, fill) }
}

// changedDevice writes to a block device, or gives blocks of it back.
func changedDevice(t *testing.T, device string, size int64, r *rand.Rand, fill func(int64) []byte) {
	t.Helper()
	off := r.Int64N(size/changedBlock) * changedBlock
	n := min(1+r.Int64N(32), (size-off)/changedBlock) * changedBlock
	flag := os.O_RDWR
	kind := r.IntN(6)
	if kind < 3 {
		flag |= unix.O_DIRECT
	}
	f, err := os.OpenFile(device, flag, 0)
	dataMust(t, err)
	defer f.Close()
	request := [2]uint64{uint64(off), uint64(n)}
	switch kind {
	case 0, 1, 3:
		_, err = f.WriteAt(fill(n), off)
	case 2: // read and written back: the same bytes in another place
		buffer := fill(n)
		if _, err = f.ReadAt(buffer, off); err == nil {
			_, err = f.WriteAt(buffer, off)
		}
	case 4:
		err = changedIoctl(f, unix.BLKDISCARD, unsafe.Pointer(&request))
	case 5:
		err = changedIoctl(f, unix.BLKZEROOUT, unsafe.Pointer(&request))
	}
	dataMust(t, err)
}

// changedFiles makes, writes, cuts and removes files of a filesystem, and trims
// it.
func changedFiles(t *testing.T, dir string, r *rand.Rand, fill func(int64) []byte) {
	t.Helper()
	name := filepath.Join(dir, fmt.Sprintf("f-%d", r.IntN(6)))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	dataMust(t, err)
	defer f.Close()
	off, n := r.Int64N(1<<20), 1+r.Int64N(256<<10)
	switch r.IntN(8) {
	case 0, 1, 2:
		_, err = f.WriteAt(fill(n), off)
	case 3:
		if _, err = f.WriteAt(fill(n), off); err == nil {
			err = f.Sync()
		}
	case 4:
		err = f.Truncate(off)
	case 5:
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	case 6:
		err = os.Remove(name)
	case 7: // what was removed is given back to the pool
		request := [3]uint64{0, 1 << 40, 0}
		err = changedIoctl(f, 0xc0185879, unsafe.Pointer(&request)) // FITRIM of linux/fs.h
	}
	dataMust(t, err)
}

func changedIoctl(f *os.File, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// What a snapshot's stream says is so whatever it is compared with: itself, a
// twin that was cut with nothing written between, or a volume that has grown.
func TestChangedBlocksOfSpecialPairs(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	c := harness.Block(harness.Writer)
	size := 16 * dataMiB
	id := d.Create("volume", size, c).GetVolumeId()
	target := d.Use("volume", id, c)
	delta := func(base, target *csi.Snapshot) harness.Metadata {
		t.Helper()
		m, err := d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: base.GetSnapshotId(), TargetSnapshotId: target.GetSnapshotId()})
		dataMust(t, err)
		return m
	}
	want := func(rule string, m harness.Metadata, capacity int64, ranges ...string) {
		t.Helper()
		if m.Capacity != capacity || !slices.Equal(changedText(m.Ranges), ranges) {
			t.Errorf("%s: %d bytes, %v; want %d, %v", rule, m.Capacity, m.Ranges, capacity, ranges)
		}
	}
	empty := d.Snapshot("empty", id)
	changedWrite(t, target, 0, changedBlock, 2*dataMiB)
	first, twin := d.Snapshot("first", id), d.Snapshot("twin", id)
	want("itself", delta(first, first), size)
	want("a twin", delta(first, twin), size)
	want("written since it was empty", delta(empty, first), size, "0+8192", "2097152+4096")
	want("the other way round", delta(first, empty), size, "0+8192", "2097152+4096")

	grown := size + 16*dataMiB
	dataGrow(t, d, id, target, "volume", grown)
	afterGrowth := d.Snapshot("after-growth", id)
	want("grown, not written", delta(first, afterGrowth), grown)
	changedWrite(t, target, size-changedBlock, size, grown-changedBlock)
	behind := d.Snapshot("behind", id)
	want("written across the old end", delta(first, behind), grown, fmt.Sprintf("%d+8192", size-changedBlock), fmt.Sprintf("%d+4096", grown-changedBlock))
	want("grown, the other way round", delta(behind, first), size, fmt.Sprintf("%d+4096", size-changedBlock))

	// When no other file shares its blocks any more, they are where they were.
	for _, s := range []*csi.Snapshot{empty, first, twin, afterGrowth} {
		_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()})
		dataMust(t, err)
	}
	d.Release("volume", id)
	last := d.Snapshot("last", id)
	d.Delete(id)
	want("alone in the pool", delta(behind, behind), grown)
	want("a twin whose volume is gone", delta(behind, last), grown)
	_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: last.GetSnapshotId()})
	dataMust(t, err)
	ctlEmptied(t, dataPool(d))
	want("the last of all", delta(behind, behind), grown)
	m, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: behind.GetSnapshotId()})
	dataMust(t, err)
	want("allocated in the last of all", m, grown, "0+8192", "2097152+4096", fmt.Sprintf("%d+8192", size-changedBlock), fmt.Sprintf("%d+4096", grown-changedBlock))
}

// changedWrite writes a block at each offset, past the page cache.
func changedWrite(t *testing.T, device string, offsets ...int64) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	dataMust(t, err)
	defer f.Close()
	for _, off := range offsets {
		_, err := f.WriteAt(bytes.Repeat([]byte{1 + byte(off>>12)}, changedBlock), off)
		dataMust(t, err)
	}
	dataMust(t, f.Sync())
}

// A thick volume's blocks are allocated from the first; those that were never
// written are no data.
func TestChangedBlocksOfAThickVolumeAreThoseThatWereWritten(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	c := harness.Block(harness.Writer)
	id := d.Create("thick", 16*dataMiB, c, harness.Parameters("provisioning", "thick")).GetVolumeId()
	target := d.Use("thick", id, c)
	dataMustBeZero(t, target, 0) // what is read is not written
	before := d.Snapshot("before", id)
	changedWrite(t, target, 8*dataMiB)
	after := d.Snapshot("after", id)
	for s, want := range map[*csi.Snapshot][]string{before: nil, after: {"8388608+4096"}} {
		m, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: s.GetSnapshotId()})
		dataMust(t, err)
		if !slices.Equal(changedText(m.Ranges), want) {
			t.Errorf("%s: %v, want %v", s.GetSnapshotId(), m.Ranges, want)
		}
	}
	m, err := d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: before.GetSnapshotId(), TargetSnapshotId: after.GetSnapshotId()})
	dataMust(t, err)
	if want := []string{"8388608+4096"}; !slices.Equal(changedText(m.Ranges), want) {
		t.Errorf("%v, want %v", m.Ranges, want)
	}
}

// Whoever is cut off goes on behind the last range, as often as that happens,
// and has read the same in the end.
func TestChangedBlocksCanBeTakenUpAnywhere(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	c := harness.Block(harness.Writer)
	id := d.Create("volume", 16*dataMiB, c).GetVolumeId()
	target := d.Use("volume", id, c)
	var offsets []int64
	for off := int64(0); off < 16*dataMiB; off += 3 * changedBlock {
		offsets = append(offsets, off)
	}
	base := d.Snapshot("base", id)
	changedWrite(t, target, offsets...)
	snapshot := d.Snapshot("target", id)
	request := func(from int64, most int32) *csi.GetMetadataDeltaRequest {
		return &csi.GetMetadataDeltaRequest{
			BaseSnapshotId: base.GetSnapshotId(), TargetSnapshotId: snapshot.GetSnapshotId(), StartingOffset: from, MaxResults: most,
			Secrets: map[string]string{"token": "none of the driver's business"},
		}
	}
	for most, messages := range map[int32]int{0: 1, 1: len(offsets), 100: (len(offsets) + 99) / 100, 1 << 30: 1} {
		m, err := d.Delta(request(0, most))
		dataMust(t, err)
		if len(m.Ranges) != len(offsets) || m.Messages != messages {
			t.Errorf("max_results %d: %d ranges in %d messages, want %d in %d", most, len(m.Ranges), m.Messages, len(offsets), messages)
		}
	}
	var got []int64
	for from := int64(0); ; {
		ctx := d.Context()
		stream, err := d.GetMetadataDelta(ctx, request(from, 50))
		dataMust(t, err)
		message, err := stream.Recv() // one message, and the stream is left
		dataMust(t, err)
		if len(message.GetBlockMetadata()) == 0 {
			break
		}
		for _, r := range message.GetBlockMetadata() {
			got = append(got, r.GetByteOffset())
			from = r.GetByteOffset() + r.GetSizeBytes()
		}
	}
	if !slices.Equal(got, offsets) {
		t.Errorf("%d ranges, want %d", len(got), len(offsets))
	}
	// A range that the offset is in begins there.
	m, err := d.Delta(request(1000, 1))
	dataMust(t, err)
	if first := changedText(m.Ranges)[0]; first != "1000+3096" {
		t.Errorf("from 1000 on: %s", first)
	}
	if strings.Contains(d.Log(), "none of the driver's business") {
		t.Error("a secret is in the log")
	}
}

// The requests that cannot be answered, by the codes of the specification.
func TestChangedBlocksThatCannotBeTold(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	c := harness.Block(harness.Writer)
	one, two := d.Create("one", dataMiB, c).GetVolumeId(), d.Create("two", dataMiB, c).GetVolumeId()
	other := d.Create("elsewhere", dataMiB, c, harness.Parameters("pool", "other")).GetVolumeId()
	a, b := d.Snapshot("a", one).GetSnapshotId(), d.Snapshot("b", one).GetSnapshotId()
	ofTwo, ofOther := d.Snapshot("of-two", two).GetSnapshotId(), d.Snapshot("of-other", other).GetSnapshotId()
	changedMustRefuse(t, d, a, b, map[string]string{ofTwo: "of volume", ofOther: "two pools"})

	// Damage is told, and guessed around by nobody.
	image := filepath.Join(dataPool(d), "snapshots", "a", "data")
	dataMust(t, os.Truncate(image, dataMiB-1))
	_, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: a})
	ctlWant(t, "a short image", err, codes.DataLoss, "bytes of")
	dataMust(t, os.Remove(image))
	_, err = d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: a, TargetSnapshotId: b})
	ctlWant(t, "no image", err, codes.DataLoss, "missing")
	file := filepath.Join(dataPool(d), "snapshots", "b", "snapshot.json")
	metadata, err := os.ReadFile(file)
	dataMust(t, err)
	dataMust(t, os.WriteFile(file, bytes.ToUpper(metadata), 0o600))
	d.Restart()
	_, err = d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: ofTwo, TargetSnapshotId: b})
	ctlWant(t, "damaged metadata", err, codes.DataLoss)
}

// changedMustRefuse asks what cannot be answered of two snapshots of a volume
// of 1 MiB, and of one with others.
func changedMustRefuse(t *testing.T, d *harness.Driver, a, b string, others map[string]string) {
	t.Helper()
	for _, c := range []struct {
		rule    string
		request *csi.GetMetadataAllocatedRequest
		code    codes.Code
		word    string
	}{
		{"no ID", &csi.GetMetadataAllocatedRequest{}, codes.InvalidArgument, "snapshot_id"},
		{"negative max_results", &csi.GetMetadataAllocatedRequest{SnapshotId: a, MaxResults: -1}, codes.InvalidArgument, "max_results"},
		{"not an ID", &csi.GetMetadataAllocatedRequest{SnapshotId: "../../etc/passwd"}, codes.NotFound, ""},
		{"not there", &csi.GetMetadataAllocatedRequest{SnapshotId: a + "x"}, codes.NotFound, a + "x"},
		{"negative offset", &csi.GetMetadataAllocatedRequest{SnapshotId: a, StartingOffset: -1}, codes.OutOfRange, "starting_offset"},
		{"behind the end", &csi.GetMetadataAllocatedRequest{SnapshotId: a, StartingOffset: dataMiB + 1}, codes.OutOfRange, "1048576"},
		{"at the end", &csi.GetMetadataAllocatedRequest{SnapshotId: a, StartingOffset: dataMiB}, codes.OK, ""},
	} {
		_, err := d.Allocated(c.request)
		ctlWant(t, "allocated, "+c.rule, err, c.code, c.word)
	}
	type delta = csi.GetMetadataDeltaRequest
	for _, c := range []struct {
		rule    string
		request *delta
		code    codes.Code
		word    string
	}{
		{"no base", &delta{TargetSnapshotId: b}, codes.InvalidArgument, "base_snapshot_id"},
		{"no target", &delta{BaseSnapshotId: a}, codes.InvalidArgument, "target_snapshot_id"},
		{"negative max_results", &delta{BaseSnapshotId: a, TargetSnapshotId: b, MaxResults: -1}, codes.InvalidArgument, "max_results"},
		{"no such base", &delta{BaseSnapshotId: a + "x", TargetSnapshotId: b}, codes.NotFound, a + "x"},
		{"no such target", &delta{BaseSnapshotId: a, TargetSnapshotId: b + "x"}, codes.NotFound, b + "x"},
		{"negative offset", &delta{BaseSnapshotId: a, TargetSnapshotId: b, StartingOffset: -1}, codes.OutOfRange, "starting_offset"},
		{"behind the end", &delta{BaseSnapshotId: a, TargetSnapshotId: b, StartingOffset: 1 << 60}, codes.OutOfRange, "starting_offset"},
		{"at the end", &delta{BaseSnapshotId: a, TargetSnapshotId: b, StartingOffset: dataMiB}, codes.OK, ""},
	} {
		_, err := d.Delta(c.request)
		ctlWant(t, "delta, "+c.rule, err, c.code, c.word)
	}
	for other, word := range others {
		_, err := d.Delta(&delta{BaseSnapshotId: other, TargetSnapshotId: b})
		ctlWant(t, "delta, base "+other, err, codes.FailedPrecondition, word)
		_, err = d.Delta(&delta{BaseSnapshotId: a, TargetSnapshotId: other})
		ctlWant(t, "delta, target "+other, err, codes.FailedPrecondition, word)
	}
}

// A pool that cannot share blocks can tell what is allocated, not what changed.
func TestChangedBlocksNeedAPoolThatSharesBlocks(t *testing.T) {
	d, _ := dataDirectory(t, "ext4", 128)
	c := harness.Block(harness.Writer)
	id := d.Create("volume", 16*dataMiB, c).GetVolumeId()
	target := d.Use("volume", id, c)
	changedWrite(t, target, 0, 8*dataMiB)
	d.Release("volume", id)
	a, b := d.Snapshot("a", id), d.Snapshot("b", id)
	m, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: b.GetSnapshotId()})
	dataMust(t, err)
	if want := []string{"0+4096", "8388608+4096"}; !slices.Equal(changedText(m.Ranges), want) {
		t.Errorf("allocated: %v, want %v", m.Ranges, want)
	}
	_, err = d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: a.GetSnapshotId(), TargetSnapshotId: b.GetSnapshotId()})
	ctlWant(t, "delta", err, codes.FailedPrecondition, "reflink")
}

// While somebody reads what changed, neither snapshot can be deleted: the answer
// could not be relied on. As soon as the reader has gone, they can.
func TestChangedBlocksHoldTheirSnapshots(t *testing.T) {
	for name, start := range map[string]func(*testing.T) *harness.Driver{
		"standalone": func(t *testing.T) *harness.Driver { return harness.Start(t, harness.FilePool("2Gi")) },
		"router":     func(t *testing.T) *harness.Driver { return harness.StartFleet(t, harness.FilePool("2Gi")).Driver },
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t)
			c := harness.Block(harness.Writer)
			volume := d.Create("volume", 64*dataMiB, c)
			base := d.Snapshot("base", volume.GetVolumeId()).GetSnapshotId()
			changedFragment(t, d, "volume", volume.GetVolumeId(), 64*dataMiB)
			target := d.Snapshot("target", volume.GetVolumeId()).GetSnapshotId()

			ctx, cancel := context.WithCancel(d.Context())
			stream, err := d.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, MaxResults: 1})
			dataMust(t, err)
			defer cancel()
			_, err = stream.Recv() // and no more: the rest fills the buffers on the way
			dataMust(t, err)
			for _, id := range []string{base, target} {
				_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
				ctlWant(t, "delete "+id, err, codes.Aborted, "delete", "inspect")
			}
			other := d.Create("restored", 0, c, harness.FromSnapshot(target)) // nothing else waits
			d.Delete(other.GetVolumeId())
			cancel()
			for _, id := range []string{base, target} {
				dataEventually(t, func() error {
					_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
					return err
				})
			}
			d.Delete(volume.GetVolumeId())
		})
	}
}

// changedFragment writes every second block of a volume's image, with the
// volume not in use: more ranges than the buffers between two processes hold.
func changedFragment(t *testing.T, d *harness.Driver, name, id string, size int64) {
	t.Helper()
	matches, err := filepath.Glob(filepath.Join(filepath.Dir(d.Dir), "*", "state", "mounts", "default", "volumes", name, "data"))
	dataMust(t, err)
	if len(matches) != 1 {
		t.Fatalf("images of %s: %v", id, matches)
	}
	f, err := os.OpenFile(matches[0], os.O_WRONLY, 0)
	dataMust(t, err)
	defer f.Close()
	data := bytes.Repeat([]byte{1}, changedBlock)
	for off := int64(0); off < size; off += 2 * changedBlock {
		_, err := f.WriteAt(data, off)
		dataMust(t, err)
	}
	dataMust(t, f.Sync())
}

// Through the router it is the same stream, of the node that has the snapshots.
func TestRouterForwardsChangedBlocks(t *testing.T) {
	f := harness.StartFleet(t, harness.FilePool("1Gi"), harness.FilePool("1Gi"))
	c := harness.Block(harness.Writer)
	there := f.Create("there", dataMiB, c, onNode("node-2")).GetVolumeId()
	elsewhere := f.Create("elsewhere", dataMiB, c, onNode("node-1")).GetVolumeId()
	far := f.Snapshot("far", elsewhere).GetSnapshotId()

	node := f.Nodes[1]
	target := node.Use("there", there, c)
	a := f.Snapshot("a", there).GetSnapshotId()
	changedWrite(t, target, 0, 4*changedBlock, 8*changedBlock)
	b := f.Snapshot("b", there).GetSnapshotId()
	node.Release("there", there)

	for name, d := range map[string]*harness.Driver{"router": f.Driver, "node": node} {
		m, err := d.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: a, TargetSnapshotId: b, StartingOffset: 10, MaxResults: 2})
		dataMust(t, err)
		if want := []string{"16384+4096", "32768+4096"}; m.Capacity != dataMiB || m.Messages != 2 && len(m.Ranges) != 3 || !slices.Equal(changedText(m.Ranges)[1:], want) {
			t.Errorf("%s: %+v", name, m)
		}
		all, err := d.Allocated(&csi.GetMetadataAllocatedRequest{SnapshotId: b})
		dataMust(t, err)
		if want := []string{"0+4096", "16384+4096", "32768+4096"}; !slices.Equal(changedText(all.Ranges), want) {
			t.Errorf("%s: allocated %v", name, all.Ranges)
		}
	}
	changedMustRefuse(t, f.Driver, a, b, map[string]string{far: "node-1"})
	_, err := f.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: far + "x", TargetSnapshotId: b})
	ctlWant(t, "a base that is not on another node", err, codes.NotFound, far+"x")

	node.Stop()
	_, err = f.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: a, TargetSnapshotId: b})
	ctlWant(t, "a node that is down", err, codes.Unavailable, "node-2")
	node.Start()
	dataEventually(t, func() error { // as soon as the router has reached it again
		_, err := f.Delta(&csi.GetMetadataDeltaRequest{BaseSnapshotId: a, TargetSnapshotId: b})
		return err
	})
}
