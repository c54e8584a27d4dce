package cluster

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// healthInterval is how often the nodes are asked for the health of their
// volumes.
const healthInterval = 30 * time.Second

// condition is one thing that is wrong with a volume.
type condition struct{ volume, status, reason string }

// health is what is known of the health of all volumes: the messages of the
// conditions, by node.
type health map[string]map[condition]string

// change is a condition that has come or gone.
type change struct {
	condition
	node    string
	message string // of one that has come
	begun   bool
}

// event is the change as it is told.
func (c change) event() (kind, reason, message string) {
	if c.begun {
		return core.EventTypeWarning, c.reason, c.status + ": " + c.message
	}
	return core.EventTypeNormal, "Mended", c.reason + " is mended"
}

// update takes over what the nodes have told and gives the changes, in a stable
// order. A node that has told nothing has changed nothing; one that has left the
// fleet is forgotten.
func (h health) update(told map[string][]*csi.VolumeHealth, fleet func(node string) bool) []change {
	var changes []change
	for node, volumes := range told {
		now := map[condition]string{}
		for _, v := range volumes {
			for _, entry := range v.GetHealthStatuses() {
				c := condition{v.GetVolumeId(), entry.GetStatus().String(), entry.GetReason()}
				now[c] = entry.GetMessage()
				if _, known := h[node][c]; !known {
					changes = append(changes, change{c, node, entry.GetMessage(), true})
				}
			}
		}
		for c := range h[node] {
			if _, still := now[c]; !still {
				changes = append(changes, change{c, node, "", false})
			}
		}
		h[node] = now
	}
	maps.DeleteFunc(h, func(node string, _ map[condition]string) bool {
		_, answered := told[node]
		return !answered && !fleet(node)
	})
	slices.SortFunc(changes, func(a, b change) int {
		return cmp.Or(cmp.Compare(a.volume, b.volume), cmp.Compare(a.reason, b.reason), cmp.Compare(a.status, b.status))
	})
	return changes
}

// undo forgets a change that could not be told, so that it is one again.
func (h health) undo(c change) {
	switch {
	case c.begun:
		delete(h[c.node], c.condition)
	case h[c.node] != nil:
		h[c.node][c.condition] = c.message
	}
}

// TellHealth tells of what is wrong with a volume, and that it is mended, at the
// claim that the volume is bound to, as an event, until ctx is done. It asks the
// nodes every half a minute. A volume without a claim is told of by the metrics
// of its node alone.
//
// Every router does so. The name of an event follows from what it tells, so that
// one of them writes it and the others find that it is there.
func (c Claims) TellHealth(ctx context.Context, fleet *Fleet, ask func(context.Context) (map[string][]*csi.VolumeHealth, error), report Report) error {
	known, began, failed := health{}, time.Now(), false
	for {
		if fleet.Problem() != nil { // it has not read who is in it
			if sleep(ctx, tryAgain) {
				return nil
			}
			continue
		}
		err := c.tellChanges(ctx, known, fleet, ask, began)
		if err != nil && !failed && ctx.Err() == nil {
			report("Events of volumes", err)
		}
		failed = err != nil
		if sleep(ctx, healthInterval) {
			return nil
		}
	}
}

// sleep waits, and reports whether ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return true
	case <-time.After(d):
		return false
	}
}

func (c Claims) tellChanges(ctx context.Context, known health, fleet *Fleet, ask func(context.Context) (map[string][]*csi.VolumeHealth, error), began time.Time) error {
	told, err := ask(ctx)
	if err != nil {
		return err
	}
	nodes, err := fleet.Nodes(ctx)
	if err != nil {
		return err
	}
	member := map[string]bool{}
	for _, n := range nodes {
		member[n.Segment] = true
	}
	changes := known.update(told, func(node string) bool { return member[node] })
	if len(changes) == 0 {
		return nil
	}
	bound := map[string]core.ObjectReference{}
	if err := c.volumes(ctx, func(v *core.PersistentVolume) {
		if v.Spec.ClaimRef != nil {
			bound[v.Spec.CSI.VolumeHandle] = *v.Spec.ClaimRef
		}
	}); err != nil {
		for _, change := range changes {
			known.undo(change)
		}
		return err
	}
	var errs []error
	for _, change := range changes {
		claim, ok := bound[change.volume]
		if !ok {
			continue
		}
		if err := c.tell(ctx, claim, change, began); err != nil {
			known.undo(change)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// tell writes an event, or counts the one that is there up. It does not if that
// one is of just now, when another router was first, or was there before this
// process began, which knows nothing of what was then.
func (c Claims) tell(ctx context.Context, claim core.ObjectReference, what change, began time.Time) error {
	kind, reason, message := what.event()
	now := meta.Now()
	e := &core.Event{
		ObjectMeta: meta.ObjectMeta{Name: eventName(claim, what), Namespace: claim.Namespace},
		InvolvedObject: core.ObjectReference{
			APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
		},
		Type: kind, Reason: reason, Message: message,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source:              core.EventSource{Component: c.Driver, Host: what.node},
		ReportingController: c.Driver,
	}
	events := func(r *rest.Request) *rest.Request { return r.Namespace(claim.Namespace).Resource("events") }
	err := events(c.Client.core.Post()).Body(e).Do(ctx).Error()
	if !apierrors.IsAlreadyExists(err) {
		if gone := apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, core.NamespaceTerminatingCause); gone {
			return nil // with its namespace
		}
		return wrap("event at claim "+claim.Namespace+"/"+claim.Name, err)
	}
	there := &core.Event{}
	if err := events(c.Client.core.Get()).Name(e.Name).Do(ctx).Into(there); err != nil {
		return wrap("event "+e.Name, err)
	}
	if last := there.LastTimestamp.Time; last.Before(began) && time.Since(began) < 2*healthInterval || time.Since(last) < 2*healthInterval {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"count": there.Count + 1, "lastTimestamp": now, "message": message})
	if err != nil {
		return err
	}
	err = events(c.Client.core.Patch(types.MergePatchType)).Name(e.Name).Body(patch).Do(ctx).Error()
	return wrap("event "+e.Name, err)
}

// eventName is made of all that tells an event from others.
func eventName(claim core.ObjectReference, what change) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %v", claim.UID, what.condition, what.begun))
	const most = 200 // of 253
	return claim.Name[:min(len(claim.Name), most)] + "." + hex.EncodeToString(sum[:8])
}
