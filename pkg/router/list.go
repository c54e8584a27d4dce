package router

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// reader reads one page of one node's list.
type reader[T any] func(ctx context.Context, m member, most int32, token string) (entries []T, next string, err error)

// list pages through the nodes one after the other. A token is a node's segment
// and that node's own token, so that it stays good when nodes and volumes come
// and go. A node that does not answer is an error that names it: a list that
// leaves something out without a word is worse than none.
func list[T any](ctx context.Context, f *fleet, most int32, token string, read reader[T]) (page []T, next string, err error) {
	if most < 0 {
		return nil, "", pool.Errorf(pool.ErrInvalid, "max_entries %d is negative", most)
	}
	from, nodeToken, err := parseToken(token)
	if err != nil {
		return nil, "", err
	}
	members, err := f.list(ctx)
	if err != nil {
		return nil, "", err
	}
	if most == 0 && token == "" {
		page, err = listAll(ctx, members, read)
		return page, "", err
	}
	for _, m := range members {
		if m.Segment < from {
			continue
		}
		if m.Segment > from {
			nodeToken = ""
		}
		room := most
		if most > 0 {
			if room -= int32(len(page)); room == 0 {
				return page, makeToken(m.Segment, nodeToken), nil
			}
		}
		entries, rest, err := read(ctx, m, room, nodeToken)
		if err != nil {
			return nil, "", at(m, err)
		}
		page = append(page, entries...)
		if rest != "" {
			return page, makeToken(m.Segment, rest), nil
		}
	}
	return page, "", nil
}

// listAll reads all nodes at once.
func listAll[T any](ctx context.Context, members []member, read reader[T]) (all []T, err error) {
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) ([]T, error) {
		entries, _, err := read(ctx, m, 0, "")
		return entries, err
	}) {
		if a.err != nil {
			return nil, a.err
		}
		all = append(all, a.value...)
	}
	return all, nil
}

func makeToken(segment, nodeToken string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(segment + "/" + nodeToken))
}

func parseToken(token string) (segment, nodeToken string, err error) {
	if token == "" {
		return "", "", nil
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(token)
	segment, nodeToken, found := strings.Cut(string(raw), "/")
	if err != nil || !found || segment == "" {
		return "", "", pool.Errorf(pool.ErrToken, "starting token %.130q was not given out by this driver; begin again without one", token)
	}
	return segment, nodeToken, nil
}

// ListVolumes implements csi.ControllerServer.
func (s *Server) ListVolumes(ctx context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	page, next, err := list(ctx, &s.fleet, r.GetMaxEntries(), r.GetStartingToken(), func(ctx context.Context, m member, most int32, token string) ([]*csi.ListVolumesResponse_Entry, string, error) {
		response, err := m.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: most, StartingToken: token})
		return response.GetEntries(), response.GetNextToken(), err
	})
	return &csi.ListVolumesResponse{Entries: page, NextToken: next}, err
}

// ControllerListVolumeHealth implements csi.ControllerServer.
func (s *Server) ControllerListVolumeHealth(ctx context.Context, r *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	page, next, err := list(ctx, &s.fleet, r.GetMaxEntries(), r.GetStartingToken(), func(ctx context.Context, m member, most int32, token string) ([]*csi.VolumeHealth, string, error) {
		response, err := m.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{MaxEntries: most, StartingToken: token})
		return response.GetEntries(), response.GetNextToken(), err
	})
	return &csi.ControllerListVolumeHealthResponse{Entries: page, NextToken: next}, err
}

// ListSnapshots implements csi.ControllerServer. One snapshot, or those of one
// volume, are asked of the node that has them.
func (s *Server) ListSnapshots(ctx context.Context, r *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	id, owner := r.GetSnapshotId(), s.snapshotOwner
	if id == "" {
		id, owner = r.GetSourceVolumeId(), s.volumeOwner
	}
	if id != "" {
		m, err := owner(ctx, id)
		if errors.Is(err, pool.ErrNotFound) {
			return &csi.ListSnapshotsResponse{}, nil
		}
		if err != nil {
			return nil, err
		}
		response, err := m.ListSnapshots(ctx, r)
		return response, at(m, err)
	}
	page, next, err := list(ctx, &s.fleet, r.GetMaxEntries(), r.GetStartingToken(), func(ctx context.Context, m member, most int32, token string) ([]*csi.ListSnapshotsResponse_Entry, string, error) {
		response, err := m.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: most, StartingToken: token})
		return response.GetEntries(), response.GetNextToken(), err
	})
	return &csi.ListSnapshotsResponse{Entries: page, NextToken: next}, err
}

// GetCapacity implements csi.ControllerServer: of one node if the topology names
// one, else of all together.
func (s *Server) GetCapacity(ctx context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	var wanted []member
	for _, m := range members {
		if request.Matches(r.GetAccessibleTopology(), m.Segment) {
			wanted = append(wanted, m)
		}
	}
	total := &csi.GetCapacityResponse{}
	var largest int64
	for _, a := range ask(ctx, wanted, func(ctx context.Context, m member) (*csi.GetCapacityResponse, error) {
		return m.GetCapacity(ctx, r)
	}) {
		if a.err != nil {
			return nil, a.err
		}
		total.AvailableCapacity += a.value.GetAvailableCapacity()
		largest = max(largest, a.value.GetMaximumVolumeSize().GetValue())
		total.MinimumVolumeSize = a.value.GetMinimumVolumeSize()
	}
	total.MaximumVolumeSize = wrapperspb.Int64(largest)
	return total, nil
}
