// Package controller is the CSI Controller, GroupController and SnapshotMetadata
// services for the pools of this node: it makes and removes volumes, snapshots
// and groups of them, and tells of them, of what changed between two, and of the
// room there is. It mounts and attaches nothing; package node does.
package controller

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

// capabilities is what the service can do (CSI spec v1.13.0,
// ControllerServiceCapability). There is no attach step: a volume is where its
// node is.
var capabilities = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_VOLUME,
	csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
}

// Server implements csi.ControllerServer, csi.GroupControllerServer
// and csi.SnapshotMetadataServer over the pools of one node.
type Server struct {
	csi.UnimplementedControllerServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer

	pools   *pool.Set
	copies  *transfer.Copies
	node    Node
	segment string // the node's topology segment

	alive context.Context //nolint:containedctx // ends with Close; the work that outlives its call has it
	close context.CancelFunc
	work  sync.WaitGroup
}

// Node is what the service needs of where volumes are used, which is the same
// machine.
type Node interface {
	// EnforceLimits makes changed limits hold for whoever uses a volume, at
	// once.
	EnforceLimits(engine pool.Engine, v pool.Volume) error
	// VolumesHealth is a [pool.VolumesHealth].
	VolumesHealth(ctx context.Context, engine pool.Engine, names []string) (map[string][]pool.Condition, error)
}

// New makes the service. Close must be called before the pools are closed.
// The copies are this server's alone.
func New(pools *pool.Set, node Node, copies *transfer.Copies) (*Server, error) {
	segment, err := pool.NodeSegment(pools.Node())
	if err != nil {
		return nil, err
	}
	s := &Server{pools: pools, node: node, copies: copies, segment: segment}
	s.alive, s.close = context.WithCancel(context.Background())
	s.work.Go(s.sweepCopies)
	return s, nil
}

// Close cuts off the work that has outlived its call, and waits until it has
// cleaned up after itself.
func (s *Server) Close() {
	s.close()
	s.work.Wait()
}

// finish runs work to its end even when the caller gives up waiting, because a
// copy that began anew with each retry might never end. A retry meanwhile is
// refused as in flight; one that comes later finds the result.
func finish[T any](ctx context.Context, s *Server, work func(context.Context) (T, error)) (T, error) {
	type outcome struct {
		value    T
		err      error
		panicked string
	}
	done := make(chan outcome, 1)
	s.work.Go(func() {
		var o outcome
		defer func() {
			if p := recover(); p != nil {
				o.panicked = fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
			done <- o
		}()
		o.value, o.err = work(s.alive)
	})
	select {
	case o := <-done:
		if o.panicked != "" {
			panic(o.panicked) // where the edge catches it
		}
		return o.value, o.err
	case <-ctx.Done():
		var none T
		return none, pool.Errorf(pool.ErrTimeout, "the work goes on, the call ended before it (%w); repeat the call", ctx.Err())
	}
}

// topology is where the node's volumes and snapshots can be used.
func (s *Server) topology() []*csi.Topology {
	return []*csi.Topology{{Segments: map[string]string{request.TopologyKey: s.segment}}}
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (s *Server) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return Capabilities(), nil
}

// Capabilities is what the service can do.
func Capabilities() *csi.ControllerGetCapabilitiesResponse {
	response := &csi.ControllerGetCapabilitiesResponse{}
	for _, c := range capabilities {
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: c}},
		})
	}
	return response
}
