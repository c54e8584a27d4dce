package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// StartupTaint keeps pods off a node until the driver serves there. Who sets a
// node up puts it on; the router takes it away.
const StartupTaint = "csi.orlop.dev/not-ready"

// patience is how often a node that seemed ready is asked in vain before that is
// worth a line in the log: some six seconds.
const patience = 6

// Untaint takes the start-up taint off every node on which the kubelet has the
// driver registered, and answers says that it serves, until ctx is done. A pod
// that is scheduled there then finds its volumes. The Fleet must run.
func (c *Client) Untaint(ctx context.Context, f *Fleet, answers func(ctx context.Context, segment string) error, report Report) error {
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, 10*time.Second))
	defer queue.ShutDown()
	if err := onChange(f.nodes, func(n *core.Node) { queue.Add(n.Name) }); err != nil {
		return err
	}
	if err := onChange(f.drivers, func(n *storage.CSINode) { queue.Add(n.Name) }); err != nil {
		return err
	}
	if err := onChange(f.slices, func(s *discovery.EndpointSlice) {
		for _, e := range s.Endpoints {
			if e.NodeName != nil {
				queue.Add(*e.NodeName)
			}
		}
	}); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, queue.ShutDown)()
	for _, i := range f.informers() {
		select {
		case <-ctx.Done():
			return nil
		case <-i.HasSyncedChecker().Done():
		}
	}
	for {
		node, shutdown := queue.Get()
		if shutdown {
			return nil
		}
		if err := c.untaint(ctx, f, node, answers, report); err != nil {
			if ctx.Err() == nil && queue.NumRequeues(node) == patience {
				report("The start-up taint stays", err, "node", node, "taint", StartupTaint)
			}
			queue.AddRateLimited(node)
		} else {
			queue.Forget(node)
		}
		queue.Done(node)
	}
}

// untaint deals with one node. It is nil if there is nothing to do, or nothing
// to do before something about the node changes.
func (c *Client) untaint(ctx context.Context, f *Fleet, name string, answers func(context.Context, string) error, report Report) error {
	object, exists, err := f.nodes.GetStore().GetByKey(name)
	if err != nil || !exists {
		return err
	}
	node, ok := object.(*core.Node)
	ours := func(t core.Taint) bool { return t.Key == StartupTaint }
	if !ok || !slices.ContainsFunc(node.Spec.Taints, ours) || !f.registered(name) {
		return nil
	}
	segment, err := pool.NodeSegment(name)
	if err != nil {
		return err
	}
	if err := answers(ctx, segment); err != nil {
		return fmt.Errorf("the driver there does not serve yet: %w", err)
	}
	// Only if the taints are still those that were seen (RFC 6902, section 4.6).
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/spec/taints", "value": node.Spec.Taints},
		{"op": "replace", "path": "/spec/taints", "value": slices.DeleteFunc(slices.Clone(node.Spec.Taints), ours)},
	})
	if err != nil {
		return err
	}
	err = c.core.Patch(types.JSONPatchType).Resource("nodes").Name(name).Body(patch).Do(ctx).Error()
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	report("The start-up taint was taken off", nil, "node", name, "taint", StartupTaint)
	return nil
}
