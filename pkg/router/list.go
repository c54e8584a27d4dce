package router

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// reader reads one page of one node's list.
type reader[T any] func(ctx context.Context, m member, most int32, token string) (entries []T, next string, err error)

// list pages through the nodes one after the other, in the order of their marks.
// A token tells a node and that node's own token, so that it stays good when
// nodes and volumes come and go. A node that does not answer is an error that
// names it: a list that leaves something out without a word is worse than none.
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
	marks := map[string]string{}
	for _, m := range members {
		marks[m.Segment] = mark(m.Segment)
	}
	slices.SortFunc(members, func(a, b member) int { return cmp.Compare(marks[a.Segment], marks[b.Segment]) })
	members = slices.DeleteFunc(members, func(m member) bool { return marks[m.Segment] < from })
	if len(members) > 0 && marks[members[0].Segment] != from {
		nodeToken = "" // of a node that is gone
	}
	if most == 0 && nodeToken == "" {
		page, err = listAll(ctx, members, read)
		return page, "", err
	}
	for _, m := range members {
		for more := true; more; more = nodeToken != "" {
			room := int32(batch)
			if most > 0 {
				room = min(room, most-int32(len(page)))
			}
			// With no room left, one entry tells whether there is more.
			entries, rest, err := readPage(ctx, m, max(room, 1), nodeToken, read)
			if err != nil {
				return nil, "", err
			}
			if room == 0 && len(entries) > 0 {
				return page, makeToken(m.Segment, nodeToken), nil
			}
			page, nodeToken = append(page, entries...), rest
		}
	}
	return page, "", nil
}

// listAll reads all nodes at once.
func listAll[T any](ctx context.Context, members []member, read reader[T]) (all []T, err error) {
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) ([]T, error) { return readAll(ctx, m, read) }) {
		if a.err != nil {
			return nil, a.err
		}
		all = append(all, a.value...)
	}
	return all, nil
}

// readAll reads the whole list of one node.
func readAll[T any](ctx context.Context, m member, read reader[T]) (all []T, err error) {
	for token := ""; ; {
		entries, next, err := read(ctx, m, batch, token)
		all = append(all, entries...)
		if token = next; err != nil || token == "" {
			return all, err
		}
	}
}

// readPage reads one page of the list of one node, with patience.
func readPage[T any](ctx context.Context, m member, most int32, token string, read reader[T]) (entries []T, next string, err error) {
	a := question(ctx, m, func(ctx context.Context, m member) ([]T, error) {
		var err error
		entries, next, err = read(ctx, m, most, token)
		return entries, err
	})
	return a.value, next, a.err
}

// A token is the mark of a node, that node's own token, and a check. With the
// node's name in it, it would be longer than the 128 bytes that CSI allows.
const (
	markLen  = 12 // of 72 bits
	checkLen = 4  // of 24 bits
)

// mark is short for a node in tokens.
func mark(segment string) string { return digest(segment)[:markLen] }

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func makeToken(segment, nodeToken string) string {
	token := mark(segment) + nodeToken
	return token + digest(token)[:checkLen]
}

func parseToken(token string) (from, nodeToken string, err error) {
	if token == "" {
		return "", "", nil
	}
	if body := len(token) - checkLen; body >= markLen && digest(token[:body])[:checkLen] == token[body:] {
		return token[:markLen], token[markLen:body], nil
	}
	return "", "", pool.Errorf(pool.ErrToken, "starting token %.130q was not given out by this driver; begin again without one", token)
}

// ListVolumes implements csi.ControllerServer.
func (s *Server) ListVolumes(ctx context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	page, next, err := list(ctx, &s.fleet, r.GetMaxEntries(), r.GetStartingToken(), readVolumes)
	return &csi.ListVolumesResponse{Entries: page, NextToken: next}, err
}

func readVolumes(ctx context.Context, m member, most int32, token string) ([]*csi.ListVolumesResponse_Entry, string, error) {
	response, err := m.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: most, StartingToken: token})
	return response.GetEntries(), response.GetNextToken(), err
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
// volume, are asked of the node that has their pool.
func (s *Server) ListSnapshots(ctx context.Context, r *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	if id := cmp.Or(r.GetSnapshotId(), r.GetSourceVolumeId()); id != "" {
		m, err := s.owner(ctx, id)
		if errors.Is(err, pool.ErrNotFound) {
			return &csi.ListSnapshotsResponse{}, nil
		}
		if err != nil {
			return nil, err
		}
		a := question(ctx, m, func(ctx context.Context, m member) (*csi.ListSnapshotsResponse, error) {
			return m.ListSnapshots(ctx, r)
		})
		return a.value, a.err
	}
	page, next, err := list(ctx, &s.fleet, r.GetMaxEntries(), r.GetStartingToken(), readSnapshots)
	return &csi.ListSnapshotsResponse{Entries: page, NextToken: next}, err
}

func readSnapshots(ctx context.Context, m member, most int32, token string) ([]*csi.ListSnapshotsResponse_Entry, string, error) {
	response, err := m.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: most, StartingToken: token})
	return response.GetEntries(), response.GetNextToken(), err
}

// GetCapacity implements csi.ControllerServer: of one node if the topology names
// one, else of all together.
func (s *Server) GetCapacity(ctx context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	members, err := s.fleet.list(ctx)
	if err != nil {
		return nil, err
	}
	members = slices.DeleteFunc(members, func(m member) bool { return !request.Matches(r.GetAccessibleTopology(), m.Segment) })
	total := &csi.GetCapacityResponse{MaximumVolumeSize: wrapperspb.Int64(0)}
	for _, a := range ask(ctx, members, func(ctx context.Context, m member) (*csi.GetCapacityResponse, error) {
		return m.GetCapacity(ctx, r)
	}) {
		if a.err != nil {
			return nil, a.err
		}
		total.AvailableCapacity += a.value.GetAvailableCapacity()
		total.MaximumVolumeSize.Value = max(total.GetMaximumVolumeSize().GetValue(), a.value.GetMaximumVolumeSize().GetValue())
		// One without such a pool tells no minimum.
		if least := a.value.GetMinimumVolumeSize(); least != nil && (total.GetMinimumVolumeSize() == nil || least.GetValue() < total.GetMinimumVolumeSize().GetValue()) {
			total.MinimumVolumeSize = least
		}
	}
	return total, nil
}
