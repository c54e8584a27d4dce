package router

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Kind is that of something a node holds.
type Kind string

// The kinds. A volume and a snapshot may have the same ID.
const (
	KindVolume   Kind = "volume"
	KindSnapshot Kind = "snapshot"
)

// Unclaimed is something that a node holds and nobody claims.
type Unclaimed struct {
	Kind   Kind      `json:"kind"`
	ID     string    `json:"id"`
	Node   string    `json:"node"`
	Bytes  int64     `json:"bytes"`            // its size; of a snapshot, that of its volume
	Volume string    `json:"volume,omitempty"` // of a snapshot, its volume's ID
	Since  time.Time `json:"since"`            // it is known to be unclaimed since then
	Orphan bool      `json:"orphan"`           // for as long as the grace period
}

// Report is what a [Orphans.Scan] found.
type Report struct {
	Unclaimed []Unclaimed `json:"unclaimed"`
	// Nodes is those that answered, Unanswered what went wrong with the rest:
	// what they hold is not known.
	Nodes      []string `json:"nodes"`
	Unanswered []string `json:"unanswered,omitempty"`
	// Kinds is those of which anything can be said.
	Kinds []Kind `json:"kinds"`

	// New is what has become an orphan since the last scan.
	New []Unclaimed `json:"-"`
}

// Orphans finds what nodes hold and nobody claims: what was on a node that came
// back after its volumes had been given up, or a provisioning that was. Nothing
// becomes an orphan before it has been unclaimed for a grace period, and nothing
// is removed without being told to.
//
// What it knows of the past is since when it has seen something unclaimed. That
// ends with the process, and then begins anew: rather later than too early.
type Orphans struct {
	server  *Server
	claimer Claimer
	grace   time.Duration
	observe func(Report, error)

	turn  chan struct{} // has one entry, which a scan or a removal takes
	known map[thing]holding
}

// thing names what a node can hold.
type thing struct {
	kind Kind
	id   string
}

// holding is what is known of a thing.
type holding struct {
	Unclaimed

	seen time.Time // when it was first listed; claims from before cannot have it
}

// NewOrphans makes one. A claimer that is nil knows nothing: then neither is
// anything known of orphans. observe is called with the outcome of each scan.
func NewOrphans(s *Server, c Claimer, grace time.Duration, observe func(Report, error)) *Orphans {
	o := &Orphans{server: s, claimer: c, grace: grace, observe: observe, turn: make(chan struct{}, 1), known: map[thing]holding{}}
	o.turn <- struct{}{}
	return o
}

// begin waits for the turn to scan or to remove.
func (o *Orphans) begin(ctx context.Context) (end func(), err error) {
	if o.claimer == nil {
		return nil, pool.Errorf(pool.ErrPrecondition, "what is claimed is not known to this router, and so not what is an orphan; it must run with --kubernetes, or with --claims-file")
	}
	select {
	case <-o.turn:
		return sync.OnceFunc(func() { o.turn <- struct{}{} }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Scan lists what the nodes hold, and reads only then what is claimed, so that
// nothing new can be missing from the claims. A node that does not answer is
// told of, and what was known of it stays as it was.
func (o *Orphans) Scan(ctx context.Context) (Report, error) {
	end, err := o.begin(ctx)
	if err != nil {
		return Report{}, err
	}
	defer end()
	report, err := o.scan(ctx)
	o.observe(report, err)
	return report, err
}

func (o *Orphans) scan(ctx context.Context) (Report, error) {
	members, err := o.server.fleet.list(ctx)
	if err != nil {
		return Report{}, err
	}
	answers := ask(ctx, members, held)
	seen := time.Now()
	claims, err := o.claims(ctx)
	if err != nil {
		return Report{}, err
	}
	report := Report{Unclaimed: []Unclaimed{}, Nodes: []string{}, Kinds: claims.kinds()}
	known := map[thing]holding{}
	for _, a := range answers {
		if a.err != nil {
			report.Unanswered = append(report.Unanswered, a.err.Error())
			for t, h := range o.known {
				if h.Node == a.Segment {
					known[t] = h
				}
			}
			continue
		}
		report.Nodes = append(report.Nodes, a.Segment)
		for _, u := range a.value {
			t := thing{u.Kind, u.ID}
			h, ok := o.known[t]
			if !ok {
				h.seen = seen
			}
			was := h.Orphan
			u.Since = h.Since
			h.Unclaimed = u
			h.judge(claims, o.grace)
			known[t] = h
			if h.Since.IsZero() {
				continue
			}
			report.Unclaimed = append(report.Unclaimed, h.Unclaimed)
			if h.Orphan && !was {
				report.New = append(report.New, h.Unclaimed)
			}
		}
	}
	o.known = known
	slices.SortFunc(report.Unclaimed, func(a, b Unclaimed) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), -cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID))
	})
	return report, nil
}

// claims asks what is claimed.
func (o *Orphans) claims(ctx context.Context) (Claims, error) {
	claims, err := o.claimer.Claimed(ctx)
	if err != nil {
		return Claims{}, pool.Errorf(pool.ErrUnavailable, "finding out what is claimed: %w", err)
	}
	return claims, nil
}

func (c Claims) of(k Kind) map[string]struct{} {
	if k == KindVolume {
		return c.Volumes
	}
	return c.Snapshots
}

func (c Claims) kinds() (kinds []Kind) {
	for _, k := range []Kind{KindVolume, KindSnapshot} {
		if c.of(k) != nil {
			kinds = append(kinds, k)
		}
	}
	return kinds
}

// judge says of a holding what the claims say.
func (h *holding) judge(c Claims, grace time.Duration) {
	claimed := c.of(h.Kind)
	_, named := claimed[h.ID]
	switch {
	case claimed == nil || named:
		h.Since, h.Orphan = time.Time{}, false
	case c.AsOf.Before(h.seen): // it may be claimed since
	case h.Since.IsZero():
		h.Since = c.AsOf
	}
	// The grace is measured by the claims, too: a list that nobody renews
	// proves nothing by being old.
	h.Orphan = !h.Since.IsZero() && c.AsOf.Sub(h.Since) >= grace
}

// held lists what a node holds.
func held(ctx context.Context, m member) (all []Unclaimed, err error) {
	volumes, err := readAll(ctx, m, readVolumes)
	if err != nil {
		return nil, err
	}
	for _, e := range volumes {
		all = append(all, Unclaimed{Kind: KindVolume, ID: e.GetVolume().GetVolumeId(), Node: m.Segment, Bytes: e.GetVolume().GetCapacityBytes()})
	}
	snapshots, err := readAll(ctx, m, readSnapshots)
	if err != nil {
		return nil, err
	}
	for _, e := range snapshots {
		s := e.GetSnapshot()
		all = append(all, Unclaimed{Kind: KindSnapshot, ID: s.GetSnapshotId(), Node: m.Segment, Bytes: s.GetSizeBytes(), Volume: s.GetSourceVolumeId()})
	}
	return all, nil
}

// Remove removes an orphan, if it is one and still unclaimed now. One that is in
// use its node refuses to remove.
func (o *Orphans) Remove(ctx context.Context, k Kind, id string) error {
	end, err := o.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	parsed, err := pool.ParseID(id)
	if err != nil {
		return err
	}
	t := thing{k, id}
	h, ok := o.known[t]
	switch {
	case !ok:
		return pool.Errorf(pool.ErrNotFound, "no node was found to hold %s %s", k, id)
	case h.Since.IsZero():
		return pool.Errorf(pool.ErrPrecondition, "%s %s is claimed; it is no orphan", k, id)
	case !h.Orphan:
		return pool.Errorf(pool.ErrPrecondition, "%s %s is in its grace period: it has been unclaimed since %s, and is an orphan after %s of that", k, id, h.Since.Format(time.RFC3339), o.grace)
	}
	// A provisioning of that name, which would find it, waits.
	named, err := o.server.names.Begin(string(k)+" "+parsed.Name, pool.Delete)
	if err != nil {
		return err
	}
	defer named()
	claims, err := o.claims(ctx)
	if err != nil {
		return err
	}
	h.judge(claims, o.grace)
	o.known[t] = h
	if !h.Orphan {
		return pool.Errorf(pool.ErrPrecondition, "%s %s is claimed by now; it is no orphan any more", k, id)
	}
	members, err := o.server.fleet.list(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(members, func(m member) bool { return m.Segment == h.Node })
	if i < 0 {
		return pool.Errorf(pool.ErrNotFound, "node %s is gone, and %s %s with it", h.Node, k, id)
	}
	if k == KindVolume {
		_, err = members[i].DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	} else {
		var cut *csi.GetSnapshotResponse
		cut, err = members[i].GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
		if group := cut.GetSnapshot().GetGroupSnapshotId(); group != "" {
			return o.removeGroup(ctx, members, claims, group)
		}
		if err == nil || is(err, codes.NotFound) {
			_, err = members[i].DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		}
	}
	if err == nil {
		delete(o.known, t)
	}
	return at(ctx, members[i], err)
}

// Run scans again and again until ctx is done.
func (o *Orphans) Run(ctx context.Context) error {
	pause := min(max(o.grace/4, time.Second), 10*time.Minute)
	soon := min(pause, 10*time.Second) // at the start, when nodes are just being found, and after a failure
	for wait := soon; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = pause
		bounded, cancel := context.WithTimeout(ctx, 5*time.Minute)
		if _, err := o.Scan(bounded); err != nil { // which observe was told of
			wait = max(soon, pause/10)
		}
		cancel()
	}
}
