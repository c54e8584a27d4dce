//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlList is a list of the controller, by the IDs of its entries.
type ctlList struct {
	name string
	read func(token string, most int32) (ids []string, next string, err error)
}

func ctlLists(d *harness.Driver) []ctlList {
	return []ctlList{
		{"ListVolumes", func(token string, most int32) ([]string, string, error) {
			got, err := d.ListVolumes(d.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: most})
			var ids []string
			for _, e := range got.GetEntries() {
				ids = append(ids, e.GetVolume().GetVolumeId())
			}
			return ids, got.GetNextToken(), err
		}},
		{"ListSnapshots", func(token string, most int32) ([]string, string, error) {
			got, err := d.ListSnapshots(d.Context(), &csi.ListSnapshotsRequest{StartingToken: token, MaxEntries: most})
			var ids []string
			for _, e := range got.GetEntries() {
				ids = append(ids, e.GetSnapshot().GetSnapshotId())
			}
			return ids, got.GetNextToken(), err
		}},
		{"ControllerListVolumeHealth", func(token string, most int32) ([]string, string, error) {
			got, err := d.ControllerListVolumeHealth(d.Context(), &csi.ControllerListVolumeHealthRequest{StartingToken: token, MaxEntries: most})
			var ids []string
			for _, e := range got.GetEntries() {
				ids = append(ids, e.GetVolumeId())
			}
			return ids, got.GetNextToken(), err
		}},
	}
}

// all reads the whole list in pages of that size; between is called after each.
func (l ctlList) all(t *testing.T, most int32, between func()) []string {
	t.Helper()
	var all []string
	for token, pages := "", 0; ; pages++ {
		ids, next, err := l.read(token, most)
		ctlMust(t, err)
		if most > 0 && len(ids) > int(most) || next != "" && len(ids) != int(most) {
			t.Errorf("%s: page %d of %d has %d entries", l.name, pages, most, len(ids))
		}
		if len(next) > 128 {
			t.Errorf("%s: the token has %d bytes", l.name, len(next))
		}
		all = append(all, ids...)
		if token = next; token == "" {
			return all
		}
		if pages > 1000 {
			t.Fatalf("%s in pages of %d has no end", l.name, most)
		}
		if between != nil {
			between()
		}
	}
}

// ctlListed makes volumes and snapshots in two pools, all of which are unwell,
// and gives their IDs in the order of lists.
func ctlListed(t *testing.T, d *harness.Driver) []string {
	t.Helper()
	var ids []string
	for _, pool := range []string{"default", "other"} {
		for i := range 5 {
			name := fmt.Sprintf("%s-%d", pool, i)
			id := d.Create(name, ctlMiB, harness.Block(harness.Writer), harness.Parameters("pool", pool)).GetVolumeId()
			d.Snapshot(name, id)
			ids = append(ids, id)
		}
	}
	for _, id := range ids {
		ctlSicken(t, d, id)
	}
	slices.Sort(ids) // by pool ID, then by name
	return ids
}

// ctlSicken takes something from a volume that its health then tells.
func ctlSicken(t *testing.T, d *harness.Driver, id string) {
	t.Helper()
	pool, _, _ := strings.Cut(ctlName(id), "-")
	ctlMust(t, os.Truncate(filepath.Join(ctlFilePool(d, pool), "volumes", ctlName(id), "data"), 4096))
}

func TestPagesMakeUpTheWholeList(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	want := ctlListed(t, d)
	for _, l := range ctlLists(d) {
		for _, most := range []int32{0, 1, 2, 5, 7, 9, 10, 11, 1 << 30} {
			if got := l.all(t, most, nil); !slices.Equal(got, want) {
				t.Errorf("%s in pages of %d: %v, want %v", l.name, most, got, want)
			}
		}
		_, _, err := l.read("", -1)
		ctlWant(t, l.name+" of -1 entries", err, codes.InvalidArgument, "max_entries")
		for _, token := range []string{"0", "x", "invalid-token", "AAAA", want[0], "../..", strings.Repeat("A", 10_000), "é", "YQ=="} {
			got, _, err := l.read(token, 1)
			ctlWant(t, fmt.Sprintf("%s from %.30q", l.name, token), err, codes.Aborted, "token")
			if len(got) > 0 {
				t.Errorf("%s from %.30q gives %v", l.name, token, got)
			}
		}
	}
	// A token is good for as long as the pool is, whoever serves.
	for _, l := range ctlLists(d) {
		if got := l.all(t, 4, d.Restart); !slices.Equal(got, want) {
			t.Errorf("%s, with a restart between its pages: %v, want %v", l.name, got, want)
		}
	}
}

func TestAnEmptyListHasNoToken(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	for _, l := range ctlLists(d) {
		for _, most := range []int32{0, 1} {
			if got, next, err := l.read("", most); err != nil || len(got) != 0 || next != "" {
				t.Errorf("%s: %v, %q, %v", l.name, got, next, err)
			}
		}
	}
}

// What is there all the time is listed exactly once, whatever comes and goes
// between the pages.
func TestAListIsRightForWhatStaysWhileTheRestChanges(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	for _, most := range []int32{1, 2, 7} {
		for _, l := range ctlLists(d) {
			stays := ctlListed(t, d)
			comesAndGoes := func(name string) {
				pool, _, _ := strings.Cut(name, "-")
				id := d.Create(name, ctlMiB, harness.Block(harness.Writer), harness.Parameters("pool", pool)).GetVolumeId()
				d.Snapshot(name, id)
				ctlSicken(t, d, id)
			}
			round := 0
			gone := func(name string) { ctlRemove(t, d, name) }
			comesAndGoes("default-2a")
			comesAndGoes("other-2a")
			got := l.all(t, most, func() {
				round++
				switch round {
				case 1:
					comesAndGoes("default-0a") // before the token or behind it
					comesAndGoes("other-9")
				case 2:
					gone("default-2a")
					gone("other-2a")
				default:
					comesAndGoes(fmt.Sprintf("default-x%d", round))
					gone(fmt.Sprintf("default-x%d", round))
				}
			})
			for _, id := range stays {
				if n := len(slices.DeleteFunc(slices.Clone(got), func(other string) bool { return other != id })); n != 1 {
					t.Errorf("%s in pages of %d has %s %d times: %v", l.name, most, id, n, got)
				}
			}
			if !slices.IsSorted(got) {
				t.Errorf("%s in pages of %d is not in order: %v", l.name, most, got)
			}
			for _, id := range append(stays, ctlIDs(t, d)...) {
				gone(ctlName(id))
			}
		}
	}
}

// ctlRemove deletes the volume and the snapshot of that name, in whatever pool.
func ctlRemove(t *testing.T, d *harness.Driver, name string) {
	t.Helper()
	for _, id := range ctlIDs(t, d) {
		if ctlName(id) == name {
			d.Delete(id)
			_, err := d.DeleteSnapshot(d.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
			ctlMust(t, err)
		}
	}
}

func TestATokenOutlivesTheEntryThatItNames(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	for _, l := range ctlLists(d) {
		want := ctlListed(t, d)
		first, token, err := l.read("", 3)
		ctlMust(t, err)
		if !slices.Equal(first, want[:3]) {
			t.Errorf("%s: %v, want %v", l.name, first, want[:3])
		}
		for _, id := range want[:4] { // also what comes next
			ctlRemove(t, d, ctlName(id))
		}
		rest, next, err := l.read(token, 0)
		ctlMust(t, err)
		if !slices.Equal(rest, want[4:]) || next != "" {
			t.Errorf("%s: then %v and token %q, want %v", l.name, rest, next, want[4:])
		}
		for _, id := range want[4:] {
			ctlRemove(t, d, ctlName(id))
		}
	}
}

func TestSnapshotsAreListedByVolumeAndByID(t *testing.T) {
	d := harness.Start(t, ctlTwoPools)
	one := d.Create("one", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	two := d.Create("two", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	var ofOne, ofTwo []string
	for i := range 5 { // by turns
		ofOne = append(ofOne, d.Snapshot(fmt.Sprintf("s%d-a", i), one).GetSnapshotId())
		ofTwo = append(ofTwo, d.Snapshot(fmt.Sprintf("s%d-b", i), two).GetSnapshotId())
	}
	list := func(r *csi.ListSnapshotsRequest) (ids []string, next string) {
		t.Helper()
		got, err := d.ListSnapshots(d.Context(), r)
		ctlMust(t, err)
		for _, e := range got.GetEntries() {
			ids = append(ids, e.GetSnapshot().GetSnapshotId())
		}
		return ids, got.GetNextToken()
	}
	for _, most := range []int32{0, 1, 2, 7} {
		var got []string
		for token := ""; ; {
			ids, next := list(&csi.ListSnapshotsRequest{SourceVolumeId: two, MaxEntries: most, StartingToken: token})
			if next != "" && len(ids) != int(most) {
				t.Errorf("a page of %d has %d entries", most, len(ids))
			}
			got = append(got, ids...)
			if token = next; token == "" {
				break
			}
		}
		if !slices.Equal(got, ofTwo) {
			t.Errorf("of one volume, in pages of %d: %v, want %v", most, got, ofTwo)
		}
	}
	for _, c := range []struct {
		rule    string
		request *csi.ListSnapshotsRequest
		want    []string
	}{
		{"one snapshot", &csi.ListSnapshotsRequest{SnapshotId: ofOne[2]}, ofOne[2:3]},
		{"one snapshot of its volume", &csi.ListSnapshotsRequest{SnapshotId: ofOne[2], SourceVolumeId: one}, ofOne[2:3]},
		{"one snapshot of another volume", &csi.ListSnapshotsRequest{SnapshotId: ofOne[2], SourceVolumeId: two}, nil},
		{"a snapshot that is gone", &csi.ListSnapshotsRequest{SnapshotId: ofOne[2] + "x"}, nil},
		{"a snapshot of another driver", &csi.ListSnapshotsRequest{SnapshotId: "snap-1"}, nil},
		{"a volume that is gone", &csi.ListSnapshotsRequest{SourceVolumeId: one + "x"}, nil},
		{"a volume of another driver", &csi.ListSnapshotsRequest{SourceVolumeId: "vol-1"}, nil},
	} {
		if got, next := list(c.request); !slices.Equal(got, c.want) || next != "" {
			t.Errorf("%s: %v and token %q, want %v", c.rule, got, next, c.want)
		}
	}
	// Of a volume that is deleted, too.
	d.Delete(two)
	if got, _ := list(&csi.ListSnapshotsRequest{SourceVolumeId: two}); !slices.Equal(got, ofTwo) {
		t.Errorf("of a deleted volume: %v, want %v", got, ofTwo)
	}
}

func TestAThousandVolumesInOnePool(t *testing.T) {
	const n, workers = 1000, 16
	d := harness.Start(t, harness.FilePool("8Gi"))
	empty := ctlRoom(t, d, "default")
	pool := d.Create("probe", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	d.Delete(pool)
	pool = strings.TrimSuffix(pool, "probe")
	each := func(what string, do func(i int, id string) error) {
		t.Helper()
		var everyone sync.WaitGroup
		for worker := range workers {
			everyone.Go(func() {
				for i := worker; i < n; i += workers {
					if err := do(i, fmt.Sprintf("%sv-%04d", pool, i)); err != nil {
						t.Errorf("%s %d: %v", what, i, err)
						return
					}
				}
			})
		}
		everyone.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	create := func(_ int, id string) error {
		got, err := d.CreateVolume(t.Context(), ctlRequest(ctlName(id), ctlRequired(4*ctlMiB)))
		if err == nil && got.GetVolume().GetVolumeId() != id {
			err = fmt.Errorf("the ID is %s, want %s", got.GetVolume().GetVolumeId(), id)
		}
		return err
	}
	check := func(when string) {
		t.Helper()
		ids := ctlLists(d)[0].all(t, 97, nil)
		if len(ids) != n || !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != n {
			t.Errorf("%s: %d volumes are listed, want %d", when, len(ids), n)
		}
		if got, want := ctlRoom(t, d, "default"), empty-n*4*ctlMiB; got != want {
			t.Errorf("%s: room for %d bytes, want %d", when, got, want)
		}
	}
	each("creating volume", create)
	check("when all are made")
	d.Kill()
	d.Start()
	check("after a crash")
	each("creating volume again", create)
	check("when all are made again")
	each("expanding volume", func(i int, id string) error {
		_, err := d.ControllerExpandVolume(t.Context(), ctlExpand(id, 4*ctlMiB, 4*ctlMiB))
		return err
	})
	snapshots := func(i int, id string) error {
		_, err := d.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s-%04d", i), SourceVolumeId: id})
		return err
	}
	each("snapshot of volume", snapshots)
	if got := ctlLists(d)[1].all(t, 100, nil); len(got) != n {
		t.Errorf("%d snapshots are listed, want %d", len(got), n)
	}
	each("deleting volume and snapshot", func(i int, id string) error {
		if _, err := d.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			return err
		}
		_, err := d.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: fmt.Sprintf("%ss-%04d", pool, i)})
		return err
	})
	if ids := ctlIDs(t, d); len(ids) != 0 {
		t.Errorf("%d volumes are left", len(ids))
	}
	ctlEmptied(t, ctlFilePool(d, "default"))
	ctlRoomSoon(t, d, "default", empty)
}
