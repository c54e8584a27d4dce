//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlUse stages and publishes a block volume, and opens it as its user does.
func ctlUse(t *testing.T, d *harness.Driver, name, id string) *os.File {
	t.Helper()
	f, err := os.OpenFile(d.Use(name, id, harness.Block(harness.Writer)), os.O_RDWR, 0)
	ctlMust(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// ctlFill writes a range of a file in pieces, in an order that leaves as many
// extents as can be, and brings it to stable storage.
func ctlFill(t *testing.T, f *os.File, size, piece int64, seed byte) {
	t.Helper()
	buffer := make([]byte, piece)
	for _, i := range rand.New(rand.NewPCG(1, uint64(seed))).Perm(int(size / piece)) {
		ctlPiece(buffer, seed, int64(i))
		if _, err := f.WriteAt(buffer, int64(i)*piece); err != nil {
			t.Fatalf("writing to a volume that the pool promised: %v", err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatalf("bringing to disk what the pool promised: %v", err)
	}
}

// ctlPiece makes the bytes of one piece of what ctlFill writes.
func ctlPiece(buffer []byte, seed byte, i int64) {
	for j := range buffer {
		buffer[j] = seed
	}
	copy(buffer, fmt.Sprintf("piece %d of %d", i, seed))
}

// ctlFilled checks what ctlFill wrote.
func ctlFilled(t *testing.T, what string, r io.ReaderAt, size, piece int64, seed byte) {
	t.Helper()
	got, want := make([]byte, piece), make([]byte, piece)
	for i := range size / piece {
		if _, err := r.ReadAt(got, i*piece); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if ctlPiece(want, seed, i); !bytes.Equal(got, want) {
			t.Fatalf("%s: piece %d is not what was written: %.40q", what, i, got)
		}
	}
}

func TestCapacityIsExactToTheByte(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	image := func(kind, name string) string {
		return filepath.Join(ctlFilePool(d, "default"), kind, name, "data")
	}
	empty := ctlRoom(t, d, "default")
	room := empty
	expect := func(rule string, change int64) {
		t.Helper()
		room += change
		for _, provisioning := range []string{"thin", "thick"} {
			if got := ctlRoom(t, d, "default", "provisioning", provisioning); got != room {
				t.Errorf("%s: room for %d bytes %s, want %d", rule, got, provisioning, room)
			}
		}
	}
	expect("an empty pool", 0)
	thin := d.Create("thin", 16*ctlMiB, block).GetVolumeId()
	expect("a thin volume", -16*ctlMiB)
	thick := d.Create("thick", 32*ctlMiB, block, harness.Parameters("provisioning", "thick")).GetVolumeId()
	expect("a thick volume", -32*ctlMiB)
	tiny := d.Create("tiny", 1, block).GetVolumeId()
	expect("a volume of one block", -4096)
	for _, id := range []string{thin, thick} {
		_, err := d.ControllerExpandVolume(d.Context(), ctlExpand(id, 48*ctlMiB, 0))
		ctlMust(t, err)
	}
	expect("growth", -(32+16)*ctlMiB)

	unwritten := d.Snapshot("unwritten", thin).GetSnapshotId()
	expect("a snapshot of what was never written", 0)
	f := ctlUse(t, d, "thin", thin)
	ctlFill(t, f, 5*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	expect("writing to a volume", 0)
	d.Release("thin", thin)
	written := d.Snapshot("written", thin).GetSnapshotId()
	held := ctlBlocks(t, image("snapshots", "written"))
	if held < 5*ctlMiB || held > 6*ctlMiB {
		t.Errorf("a snapshot of 5 MiB holds %d bytes", held)
	}
	expect("a snapshot of what was written", -held)
	ofThick := d.Snapshot("of-thick", thick).GetSnapshotId()
	heldOfThick := ctlBlocks(t, image("snapshots", "of-thick"))
	expect("a snapshot of a thick volume", -heldOfThick)
	restored := d.Create("restored", 0, block, harness.FromSnapshot(written)).GetVolumeId()
	expect("a restored snapshot", -48*ctlMiB)
	copied := d.Create("copied", 64*ctlMiB, block, harness.FromVolume(thin)).GetVolumeId()
	expect("a larger copy", -64*ctlMiB)

	d.Restart()
	expect("a restart", 0)
	d.Kill()
	d.Start()
	expect("a crash", 0)

	for _, c := range []struct {
		call ctlCall
		back int64
	}{
		{ctlDeletesSnapshot(d, written), held},
		{ctlDeletes(d, thin), 48 * ctlMiB},
		{ctlDeletes(d, restored), 48 * ctlMiB},
		{ctlDeletesSnapshot(d, unwritten), 0},
		{ctlDeletes(d, thick), 48 * ctlMiB},
		{ctlDeletesSnapshot(d, ofThick), heldOfThick},
		{ctlDeletes(d, copied), 64 * ctlMiB},
		{ctlDeletes(d, tiny), 4096},
	} {
		_, err := c.call.call()
		ctlWant(t, c.call.name, err, codes.OK)
		ctlEmptied(t, ctlFilePool(d, "default"))
		ctlRoomSoon(t, d, "default", room+c.back)
		expect(c.call.name, c.back)
	}
	if room != empty {
		t.Errorf("the emptied pool has room for %d bytes, had %d", room, empty)
	}
}

func TestAFullPoolTakesNothingMoreAndStaysAsItIs(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	v := d.Create("v", 16*ctlMiB, block).GetVolumeId()
	f := ctlUse(t, d, "v", v)
	ctlFill(t, f, 16*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Release("v", v)
	rest := ctlRoom(t, d, "default")
	full := d.Create("full", rest, block).GetVolumeId()
	if got := ctlRoom(t, d, "default"); got != 0 {
		t.Errorf("the full pool has room for %d bytes", got)
	}
	before := ctlState(t, d, "default")
	for _, c := range []ctlCall{
		ctlCreates(d, "more", ctlRequired(4096)),
		ctlCreates(d, "more", ctlRequired(4096), harness.Parameters("provisioning", "thick")),
		ctlCreates(d, "more", harness.FromVolume(v)),
		ctlExpands(d, v, 16*ctlMiB+4096),
		ctlExpands(d, full, rest+1),
		ctlSnaps(d, "more", v),
	} {
		_, err := c.call()
		ctlWant(t, c.name, err, codes.ResourceExhausted, "pool default", "promise")
		ctlSame(t, c.name, before, ctlState(t, d, "default"))
	}
	// What needs no room is still done.
	for _, c := range []ctlCall{ctlCreates(d, "v"), ctlExpands(d, v, 16*ctlMiB), ctlSnaps(d, "of-nothing", full)} {
		_, err := c.call()
		ctlWant(t, c.name, err, codes.OK)
	}
}

// Deletion is done in the background; who deletes and creates at once does not
// notice.
func TestWhatWasDeletedCanBeHadAgainAtOnce(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	block := harness.Block(harness.Writer)
	rest := ctlRoom(t, d, "default")
	for i, provisioning := range []string{"thin", "thick", "thick", "thin", "thick", "thin"} {
		name := fmt.Sprintf("full-%d", i)
		d.Delete(d.Create(name, rest, block, harness.Parameters("provisioning", provisioning)).GetVolumeId())
	}
	// Also where much was written, in many pieces.
	for i := range 3 {
		name := fmt.Sprintf("written-%d", i)
		id := d.Create(name, rest, block).GetVolumeId()
		f := ctlUse(t, d, name, id)
		ctlFill(t, f, 64*ctlMiB, 64<<10, byte(i))
		ctlMust(t, f.Close())
		d.Release(name, id)
		d.Delete(id)
	}
	ctlRoomSoon(t, d, "default", rest)
}

// Every byte of every volume and snapshot can be written when the pool has
// promised all it has: nobody ever sees "no space" because of another.
func TestAVolumeCanAlwaysBeFilled(t *testing.T) {
	const piece = 16 << 10
	d := harness.Start(t, harness.FilePool("512Mi"))
	block := harness.Block(harness.Writer)
	sizes := map[string]int64{"thin": 96 * ctlMiB, "thick": 48 * ctlMiB}
	ids := map[string]string{}
	for name, size := range sizes {
		ids[name] = d.Create(name, size, block, harness.Parameters("provisioning", name)).GetVolumeId()
		f := ctlUse(t, d, name, ids[name])
		ctlFill(t, f, size, piece, 1)
		ctlMust(t, f.Close())
	}
	snapshots := map[string]string{}
	for name := range sizes {
		snapshots[name] = d.Snapshot("of-"+name, ids[name]).GetSnapshotId()
	}
	sizes["rest"] = ctlRoom(t, d, "default") / piece * piece
	ids["rest"] = d.Create("rest", sizes["rest"], block).GetVolumeId()
	ctlUse(t, d, "rest", ids["rest"])
	if room := ctlRoom(t, d, "default"); room >= piece {
		t.Fatalf("the pool has room for %d bytes more", room)
	}
	var everyone sync.WaitGroup
	for name, size := range sizes { // at once, as their users do
		everyone.Go(func() {
			f, err := os.OpenFile(d.Target(name), os.O_RDWR, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			ctlFill(t, f, size, piece, 2)
		})
	}
	everyone.Wait()
	for name, size := range sizes {
		f, err := os.Open(d.Target(name))
		ctlMust(t, err)
		ctlFilled(t, "volume "+name, f, size, piece, 2)
		ctlMust(t, f.Close())
	}
	for name := range snapshots {
		f, err := os.Open(filepath.Join(ctlFilePool(d, "default"), "snapshots", "of-"+name, "data"))
		ctlMust(t, err)
		ctlFilled(t, "snapshot of "+name, f, sizes[name], piece, 1)
		ctlMust(t, f.Close())
	}
	health, err := d.ControllerListVolumeHealth(d.Context(), &csi.ControllerListVolumeHealthRequest{})
	ctlMust(t, err)
	if len(health.GetEntries()) != 0 {
		t.Errorf("the full volumes are not well: %v", health.GetEntries())
	}
}

func TestThickTakesItsBlocksAtOnceAndThinDoesNot(t *testing.T) {
	for kind, config := range map[string]func(*testing.T, *string) string{
		"sharing": func(*testing.T, *string) string { return harness.FilePool("1Gi") },
		"copying": func(t *testing.T, dir *string) string {
			*dir = ctlExt4(t, ctlGiB)
			return harness.DirectoryPool(*dir)
		},
	} {
		t.Run(kind, func(t *testing.T) {
			var dir string
			d := harness.Start(t, config(t, &dir))
			if dir == "" {
				dir = ctlFilePool(d, "default")
			}
			blocks := func(name string) int64 { return ctlBlocks(t, filepath.Join(dir, "volumes", name, "data")) }
			block := harness.Block(harness.Writer)
			thick := harness.Parameters("provisioning", "thick")
			source := d.Create("thin", 32*ctlMiB, block).GetVolumeId()
			if n := blocks("thin"); n > ctlMiB {
				t.Errorf("an unwritten thin volume takes %d bytes", n)
			}
			f := ctlUse(t, d, "thin", source)
			ctlFill(t, f, 4*ctlMiB, ctlMiB, 1)
			ctlMust(t, f.Close())
			d.Release("thin", source)
			if n := blocks("thin"); n < 4*ctlMiB || n > 6*ctlMiB {
				t.Errorf("a thin volume with 4 MiB written takes %d bytes", n)
			}
			snapshot := d.Snapshot("s", source).GetSnapshotId()
			grown := d.Create("thick", 32*ctlMiB, block, thick).GetVolumeId()
			d.Create("thick-copy", 48*ctlMiB, block, thick, harness.FromVolume(source))
			d.Create("thick-restored", 0, block, thick, harness.FromSnapshot(snapshot))
			for name, size := range map[string]int64{"thick": 32 * ctlMiB, "thick-copy": 48 * ctlMiB, "thick-restored": 32 * ctlMiB} {
				if n := blocks(name); n < size || n > size+2*ctlMiB {
					t.Errorf("%s, a volume of %d bytes, takes %d", name, size, n)
				}
			}
			_, err := d.ControllerExpandVolume(d.Context(), ctlExpand(grown, 64*ctlMiB, 0))
			ctlMust(t, err)
			if n := blocks("thick"); n < 64*ctlMiB {
				t.Errorf("a thick volume that grew to 64 MiB takes %d bytes", n)
			}
			// What its user discards, or a filesystem on it frees, stays its own.
			f = ctlUse(t, d, "thick", grown)
			ctlFill(t, f, 4*ctlMiB, ctlMiB, 1)
			ctlMust(t, f.Close())
			if n := blocks("thick"); n < 64*ctlMiB {
				t.Errorf("a thick volume that was written takes %d bytes", n)
			}
		})
	}
}

func TestReserveAndOvercommitDecideWhatIsPromised(t *testing.T) {
	config := "pools:\n"
	for name, settings := range map[string]string{
		"plain":  "reserve: 0",
		"bytes":  "reserve: 100Mi",
		"tenth":  "reserve: 10%",
		"silent": "",
		"double": "reserve: 10%, overcommit: 2.0",
	} {
		config += fmt.Sprintf("- {name: %s, source: {file: {path: $DIR/%s.img, size: 512Mi, sparse: true}}, %s}\n", name, name, settings)
	}
	d := harness.Start(t, config)
	whole := func(n int64) int64 { return n / 4096 * 4096 }
	total := ctlRoom(t, d, "plain")
	if total < 400*ctlMiB || total > 512*ctlMiB {
		t.Errorf("a pool of 512 MiB holds %d bytes", total)
	}
	for pool, want := range map[string]int64{
		"bytes":  total - 100*ctlMiB,
		"tenth":  total - total/10,
		"silent": total - total/20,
		"double": 2 * (total - total/10),
	} {
		if got := ctlRoom(t, d, pool); got != whole(got) || got > want || got < want-2*4096 {
			t.Errorf("pool %s has room for %d bytes, want %d", pool, got, want)
		}
	}
	real := ctlRoom(t, d, "double", "provisioning", "thick")
	if tenth := ctlRoom(t, d, "tenth"); real != tenth {
		t.Errorf("a thick volume can have %d bytes of an overcommitted pool, of another one %d", real, tenth)
	}

	block := harness.Block(harness.Writer)
	double := func(provisioning string) ctlChange {
		return harness.Parameters("pool", "double", "provisioning", provisioning)
	}
	thin := ctlRoom(t, d, "double")
	d.Create("thin", 400*ctlMiB, block, double("thin"))
	d.Create("thinner", 200*ctlMiB, block, double("thin"))
	if got := ctlRoom(t, d, "double"); got != thin-600*ctlMiB {
		t.Errorf("600 MiB of thin volumes took %d bytes of promises", thin-got)
	}
	if got, want := ctlRoom(t, d, "double", "provisioning", "thick"), whole(real-300*ctlMiB); got != want {
		t.Errorf("after 600 MiB of thin volumes there are %d bytes for thick ones, want %d", got, want)
	}
	_, err := d.CreateVolume(d.Context(), ctlRequest("thick", ctlRequired(real-300*ctlMiB+4096), double("thick")))
	ctlWant(t, "a thick volume is not overcommitted", err, codes.ResourceExhausted, "double")
	d.Create("thick", 50*ctlMiB, block, double("thick"))
	if got := ctlRoom(t, d, "double"); got != thin-700*ctlMiB {
		t.Errorf("50 MiB of thick volumes took %d bytes of thin promises, want 100 MiB", thin-600*ctlMiB-got)
	}
}

func TestGetCapacityTellsWhatCanBeMade(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	for _, c := range []struct {
		rule     string
		request  *csi.GetCapacityRequest
		none     bool
		smallest int64
	}{
		{"nothing is asked", &csi.GetCapacityRequest{}, false, 4096},
		{"a block volume", &csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{harness.Block(harness.Writer)}}, false, 4096},
		{"ext4", &csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{harness.Mount("", harness.Writer)}}, false, 8 * ctlMiB},
		{"XFS", &csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{harness.Mount("xfs", harness.Writer)}}, false, 300 * ctlMiB},
		{"btrfs by parameter", &csi.GetCapacityRequest{
			VolumeCapabilities: []*csi.VolumeCapability{harness.Mount("", harness.Writer)}, Parameters: map[string]string{"csi.storage.k8s.io/fstype": "btrfs"},
		}, false, 256 * ctlMiB},
		{"this node", &csi.GetCapacityRequest{AccessibleTopology: ctlNode(harness.NodeID)}, false, 4096},
		{"a topology without nodes", &csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{"zone": "a"}}}, false, 4096},
		{"another node", &csi.GetCapacityRequest{AccessibleTopology: ctlNode("node-2")}, true, 0},
		{"a pool that is not here", &csi.GetCapacityRequest{Parameters: map[string]string{"pool": "fast"}}, true, 0},
	} {
		got, err := d.GetCapacity(d.Context(), c.request)
		ctlWant(t, c.rule, err, codes.OK)
		if c.none {
			if got.GetAvailableCapacity() != 0 || got.GetMaximumVolumeSize() == nil || got.GetMaximumVolumeSize().GetValue() != 0 {
				t.Errorf("%s: %v; want nothing", c.rule, got)
			}
			continue
		}
		if got.GetAvailableCapacity() < ctlGiB || got.GetMaximumVolumeSize().GetValue() != got.GetAvailableCapacity() || got.GetMinimumVolumeSize().GetValue() != c.smallest {
			t.Errorf("%s: %v; want at least 1 GiB and volumes from %d bytes", c.rule, got, c.smallest)
		}
	}
	for rule, r := range map[string]*csi.GetCapacityRequest{
		"an unknown parameter": {Parameters: map[string]string{"colour": "red"}},
		"ReadWriteMany":        {VolumeCapabilities: []*csi.VolumeCapability{harness.Block(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}},
	} {
		_, err := d.GetCapacity(d.Context(), r)
		ctlWant(t, rule, err, codes.InvalidArgument)
	}

	largest := ctlRoom(t, d, "other")
	_, err := d.CreateVolume(d.Context(), ctlRequest("v", ctlRequired(largest+1), harness.Parameters("pool", "other")))
	ctlWant(t, "one byte more than the largest", err, codes.ResourceExhausted)
	v := d.Create("v", largest, harness.Block(harness.Writer), harness.Parameters("pool", "other"))
	if v.GetCapacityBytes() != largest || ctlRoom(t, d, "other") != 0 {
		t.Errorf("the largest volume has %d bytes, want %d", v.GetCapacityBytes(), largest)
	}
	d.Create("smallest", 1, harness.Mount("btrfs", harness.Writer), ctlLimit(256*ctlMiB))
}

// What others write on the filesystem of a directory pool is not the pool's to
// promise.
func TestADirectorySharesItsFilesystemWithOthers(t *testing.T) {
	dir := ctlExt4(t, ctlGiB)
	d := harness.Start(t, harness.DirectoryPool(dir))
	others := filepath.Join(filepath.Dir(dir), "others")
	occupy := func(n int64) {
		t.Helper()
		f, err := os.Create(others)
		ctlMust(t, err)
		defer f.Close()
		_, err = io.CopyN(f, ctlZeros{}, n)
		ctlMust(t, err)
		ctlMust(t, f.Sync())
	}
	near := func(rule string, want int64) {
		t.Helper()
		var got int64
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if got = ctlRoom(t, d, "default"); got > want-8*ctlMiB && got < want+8*ctlMiB {
				return
			}
		}
		t.Errorf("%s: room for %d bytes, want about %d", rule, got, want)
	}
	empty := ctlRoom(t, d, "default")
	v := d.Create("v", 128*ctlMiB, harness.Block(harness.Writer), harness.Parameters("provisioning", "thick")).GetVolumeId()
	near("a volume", empty-128*ctlMiB)
	occupy(256 * ctlMiB)
	near("others wrote", empty-(128+256*95/100)*ctlMiB)
	f := ctlUse(t, d, "v", v)
	ctlFill(t, f, 64*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	near("the volume was written", empty-(128+256*95/100)*ctlMiB)
	ctlMust(t, os.Remove(others))
	near("others removed theirs", empty-128*ctlMiB)
	d.Release("v", v)
	d.Delete(v)
	near("the volume was deleted", empty)

	// If they are quicker than the driver can know, the call fails cleanly.
	rest := ctlRoom(t, d, "default")
	occupy(rest / 2)
	_, err := d.CreateVolume(d.Context(), ctlRequest("too-large", ctlRequired(rest), harness.Parameters("provisioning", "thick")))
	ctlWant(t, "a thick volume for which others left no blocks", err, codes.ResourceExhausted)
	ctlEmptied(t, dir)
	if ids := ctlIDs(t, d); len(ids) != 0 {
		t.Errorf("left: %v", ids)
	}
	ctlMust(t, os.Remove(others))
	near("after that", empty)
}

// What the pool's own volumes come to take was promised to them: to nobody it
// looks as if others had taken it, whenever it was written.
func TestWhatTheVolumesOfADirectoryTakeIsNotTakenForThatOfOthers(t *testing.T) {
	d := harness.Start(t, harness.DirectoryPool(ctlExt4(t, ctlGiB)))
	block := harness.Block(harness.Writer)
	room := ctlRoom(t, d, "default")
	expect := func(when string, change int64) {
		t.Helper()
		room += change
		// The driver looks once a second; it must not think better of it.
		for end := time.Now().Add(1200 * time.Millisecond); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if got := ctlRoom(t, d, "default"); got < room-8*ctlMiB || got > room+8*ctlMiB {
				t.Errorf("%s: room for %d bytes, want about %d", when, got, room)
				return
			}
		}
	}
	for i := range 200 { // more than are measured again in one turn
		d.Create(fmt.Sprintf("other-%d", i), 4096, block)
	}
	v := d.Create("volume", 128*ctlMiB, block).GetVolumeId()
	expect("a volume", -128*ctlMiB)
	f := ctlUse(t, d, "volume", v)
	ctlFill(t, f, 64*ctlMiB, ctlMiB, 1)
	expect("it was written", 0)
	ctlFill(t, f, 128*ctlMiB, ctlMiB, 2)
	ctlMust(t, f.Close())
	d.Release("volume", v)
	expect("it was written and released", 0)
	d.Restart()
	_, err := d.ControllerExpandVolume(d.Context(), ctlExpand(v, 256*ctlMiB, 0))
	ctlMust(t, err)
	expect("it grew", -128*ctlMiB)
	d.Delete(v)
	room += 256 * ctlMiB // its space is freed in the background
	for end := time.Now().Add(20 * time.Second); ctlRoom(t, d, "default") < room-8*ctlMiB; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it was deleted: room for %d bytes, want about %d", ctlRoom(t, d, "default"), room)
		}
	}
}

// ctlZeros reads as zeros without end.
type ctlZeros struct{}

func (ctlZeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
