package router

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// claimed is claims that a test makes up.
type claimed struct {
	volumes, snapshots map[string]struct{}
	asOf               func() time.Time
	err                error
	before             func() // is called before they are read
}

func newClaimed() *claimed {
	return &claimed{volumes: map[string]struct{}{}, snapshots: map[string]struct{}{}, asOf: time.Now}
}

func (c *claimed) Claimed(context.Context) (Claims, error) {
	if c.before != nil {
		c.before()
	}
	return Claims{maps.Clone(c.volumes), maps.Clone(c.snapshots), c.asOf()}, c.err
}

func (c *claimed) claim(id string) { c.volumes[id] = struct{}{} }

// scanned scans and gives what is unclaimed, by ID, and whether it is an orphan.
func scanned(t *testing.T, o *Orphans) map[string]bool {
	t.Helper()
	r, err := o.Scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, u := range r.Unclaimed {
		found[u.ID] = u.Orphan
	}
	return found
}

func same(t *testing.T, when string, got, want map[string]bool) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("%s: %v, want %v", when, got, want)
	}
}

// ahead is a clock that a test sets forward.
func ahead() (now func() time.Time, forward func(time.Duration)) {
	var by atomic.Int64
	return func() time.Time { return time.Now().Add(time.Duration(by.Load())) }, func(d time.Duration) { by.Add(int64(d)) }
}

func TestAnOrphanIsWhatNothingHasClaimedForTheGracePeriod(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib)
	c := newClaimed()
	now, forward := ahead()
	c.asOf = now
	var reports []Report
	o := NewOrphans(s, c, time.Hour, func(r Report, _ error) { reports = append(reports, r) })

	wanted := made(t, s, volume("wanted", among("node-1")))
	lost := made(t, s, volume("lost", among("node-2")))
	c.claim(wanted)
	response, err := s.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "lost", SourceVolumeId: lost})
	if err != nil {
		t.Fatal(err)
	}
	if response.GetSnapshot().GetSnapshotId() != lost {
		t.Fatal("this test is about a volume and a snapshot with the same ID")
	}
	c.snapshots[lost] = struct{}{} // of the volume it says nothing

	same(t, "at once", scanned(t, o), map[string]bool{lost: false})
	forward(59 * time.Minute)
	same(t, "before the grace period is over", scanned(t, o), map[string]bool{lost: false})
	forward(time.Minute)
	same(t, "after it", scanned(t, o), map[string]bool{lost: true})
	same(t, "later", scanned(t, o), map[string]bool{lost: true})
	var told int
	for _, r := range reports {
		told += len(r.New)
	}
	if told != 1 || len(reports) != 4 {
		t.Errorf("%d of %d reports tell of a new orphan, want 1 of 4", told, len(reports))
	}
	c.claim(lost)
	same(t, "when it is claimed again", scanned(t, o), map[string]bool{})
	delete(c.volumes, lost)
	same(t, "its grace period begins anew", scanned(t, o), map[string]bool{lost: false})

	// A node that does not answer: nothing is known of it, and nothing forgotten.
	forward(time.Hour)
	nodes[1].Before(failing())
	r, err := o.Scan(t.Context())
	if err != nil || len(r.Unanswered) != 1 || len(r.Unclaimed) != 0 || !slices.Equal(r.Nodes, []string{"node-1"}) {
		t.Errorf("%+v, %v", r, err)
	}
	nodes[1].Before(failing("none"))
	same(t, "when it answers again", scanned(t, o), map[string]bool{lost: true})

	c.err = errors.New("no answer")
	_, err = o.Scan(t.Context())
	wantCode(t, "claims that are not known", err, codes.Unavailable)
	_, err = NewOrphans(s, nil, time.Hour, func(Report, error) {}).Scan(t.Context())
	wantCode(t, "claims that nobody knows", err, codes.FailedPrecondition)
}

func TestClaimsOlderThanAVolumeMakeItNoOrphan(t *testing.T) {
	s, _, _ := startFleet(t, 4*gib)
	c := newClaimed()
	now, forward := ahead()
	o := NewOrphans(s, c, time.Nanosecond, func(Report, error) {})

	// A volume that is made, and claimed, while a scan is under way.
	c.before = func() { c.claim(made(t, s, volume("during"))) }
	same(t, "made after the list of volumes", scanned(t, o), map[string]bool{})
	c.before = nil

	// A list of claims that nobody keeps up.
	old := time.Now()
	c.asOf = func() time.Time { return old }
	late := made(t, s, volume("late"))
	for range 3 {
		same(t, "claims from before", scanned(t, o), map[string]bool{})
		forward(time.Hour)
	}
	c.asOf = now
	same(t, "new claims", scanned(t, o), map[string]bool{late: false})
	asOf := now()
	c.asOf = func() time.Time { return asOf }
	scanned(t, o)
	same(t, "and still newer ones", scanned(t, o), map[string]bool{late: true})

	c.snapshots = nil
	r, err := o.Scan(t.Context())
	if err != nil || !slices.Equal(r.Kinds, []Kind{KindVolume}) {
		t.Errorf("where there are no snapshots: %+v, %v", r, err)
	}
}

func TestOnlyAnOrphanIsRemoved(t *testing.T) {
	s, _, nodes := startFleet(t, 4*gib, 2*gib)
	c := newClaimed()
	now, forward := ahead()
	c.asOf = now
	o := NewOrphans(s, c, time.Hour, func(Report, error) {})
	lost, wanted, late := made(t, s, volume("lost", among("node-1"))), made(t, s, volume("wanted", among("node-1"))), made(t, s, volume("late", among("node-1")))
	c.claim(wanted)
	scanned(t, o)
	forward(time.Hour)
	fresh := made(t, s, volume("fresh", among("node-1")))
	same(t, "before", scanned(t, o), map[string]bool{lost: true, late: true, fresh: false})
	c.claim(late) // after the scan

	for _, refused := range []struct {
		what string
		kind Kind
		id   string
		code codes.Code
	}{
		{"one that is claimed", KindVolume, wanted, codes.FailedPrecondition},
		{"one that is claimed by now", KindVolume, late, codes.FailedPrecondition},
		{"one in its grace period", KindVolume, fresh, codes.FailedPrecondition},
		{"a snapshot with a volume's ID", KindSnapshot, lost, codes.NotFound},
		{"no ID", KindVolume, "pvc-1", codes.NotFound},
	} {
		wantCode(t, refused.what, o.Remove(t.Context(), refused.kind, refused.id), refused.code)
	}
	if n := len(nodes[0].volumes); n != 4 {
		t.Fatalf("%d volumes are left of 4", n)
	}
	c.err = errors.New("no answer")
	wantCode(t, "while claims are not known", o.Remove(t.Context(), KindVolume, lost), codes.Unavailable)
	c.err = nil

	// A provisioning that would find it does not run beside the removal.
	during := make(chan error, 1)
	nodes[0].Before(func(_ context.Context, method string) error {
		if method == "DeleteVolume" {
			_, err := s.CreateVolume(context.Background(), volume("lost", among("node-1")))
			during <- err
		}
		return nil
	})
	if err := o.Remove(t.Context(), KindVolume, lost); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a provisioning of that name meanwhile", <-during, codes.Aborted)
	if _, err := nodes[0].Volume("lost"); !errors.Is(err, pool.ErrNotFound) {
		t.Errorf("after its removal: %v", err)
	}
	wantCode(t, "one that is removed already", o.Remove(t.Context(), KindVolume, lost), codes.NotFound)
	same(t, "after", scanned(t, o), map[string]bool{fresh: false})
}

func TestClaimsFromAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "claims")
	if _, err := FileClaims(path).Claimed(t.Context()); err == nil {
		t.Error("a file that is not there claims something")
	}
	if err := os.WriteFile(path, []byte("# all\n\n n/p/one \nn/p/two # restored\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	written := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := os.Chtimes(path, written, written); err != nil {
		t.Fatal(err)
	}
	got, err := FileClaims(path).Claimed(t.Context())
	want := map[string]struct{}{"n/p/one": {}, "n/p/two": {}}
	if err != nil || !maps.Equal(got.Volumes, want) || !maps.Equal(got.Snapshots, want) || !got.AsOf.Equal(written) {
		t.Errorf("%+v, %v", got, err)
	}
}
