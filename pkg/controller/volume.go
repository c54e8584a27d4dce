package controller

import (
	"cmp"
	"context"
	"errors"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// CreateVolume implements csi.ControllerServer.
func (s *Server) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := request.Required("name", r.GetName()); err != nil {
		return nil, err
	}
	capability, err := request.ParseCapabilities(r.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	parameters, err := request.ParseParameters(r.GetParameters())
	if err != nil {
		return nil, err
	}
	limits, err := request.ChangeLimits(pool.Limits{}, r.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	fsType, mkfs, err := request.Layout(capability, parameters)
	if err != nil {
		return nil, err
	}
	if !request.Reachable(r.GetAccessibilityRequirements(), s.segment) {
		return nil, pool.Errorf(pool.ErrNoSpace, "accessibility_requirements do not allow node %s", s.segment)
	}
	source := pool.Source{
		SnapshotID: r.GetVolumeContentSource().GetSnapshot().GetSnapshotId(),
		VolumeID:   r.GetVolumeContentSource().GetVolume().GetVolumeId(),
	}
	if r.GetVolumeContentSource() != nil && source == (pool.Source{}) {
		return nil, pool.Errorf(pool.ErrInvalid, "volume_content_source names neither a snapshot nor a volume")
	}

	existingOnly := request.ExistingOnly(ctx)
	order, err := request.CopyOrder(ctx)
	if err != nil {
		return nil, err
	}
	end, err := s.pools.BeginNamed(r.GetName(), pool.Create)
	if err != nil {
		return nil, cmp.Or(s.copies.Ask(r.GetName(), order), err)
	}
	// spec is what is wanted, by the size that it has if none is asked for.
	spec := func(fallback int64) (pool.VolumeSpec, error) {
		size, limit, err := request.Size(r.GetCapacityRange(), request.Smallest(capability.Access, fsType), fallback)
		return pool.VolumeSpec{
			RequestName:  r.GetName(),
			Size:         size,
			MaxSize:      limit,
			Provisioning: parameters.Provisioning,
			Access:       capability.Access,
			Filesystem:   string(fsType),
			MkfsOptions:  strings.Join(mkfs, " "),
			Source:       source,
			Limits:       limits,
		}, err
	}
	v, err := finish(ctx, s, func(ctx context.Context) (pool.Volume, error) {
		defer end()
		if from := s.elsewhere(r.GetName(), parameters.Pool, source, order); from != nil && !existingOnly {
			return s.copyVolume(ctx, r.GetName(), parameters.Pool, from, spec)
		}
		engine, fallback, release, err := s.place(r.GetName(), parameters.Pool, source, existingOnly)
		if err != nil {
			return pool.Volume{}, err
		}
		defer release()
		wanted, err := spec(fallback)
		if err != nil {
			return pool.Volume{}, err
		}
		return engine.CreateVolume(ctx, wanted)
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: s.volume(v)}, nil
}

// place finds the pool for a new volume: the one that has a volume of that name
// already, else that of its source, else the one that the parameters name. (A
// source in another pool than that is copied; see elsewhere.) The
// source is held against deletion until release. fallback is the size of the
// volume if none is asked for. With existingOnly, a volume of that name must be
// there.
func (s *Server) place(requestName, poolName string, source pool.Source, existingOnly bool) (engine pool.Engine, fallback int64, release func(), err error) {
	release = func() {}
	engine, existing, err := s.pools.VolumeNamed(requestName)
	switch {
	case err == nil && poolName != "" && engine.Info().Name != poolName:
		return nil, 0, nil, pool.Errorf(pool.ErrExists, "volume %s exists in pool %s", existing.ID, engine.Info().Name)
	case err == nil:
		return engine, min(existing.Size, request.DefaultSize), release, nil
	case existingOnly || !errors.Is(err, pool.ErrNotFound):
		return nil, 0, nil, err
	}
	switch {
	case source.SnapshotID != "":
		if release, err = s.holdSnapshot(source.SnapshotID, pool.Copy); err != nil {
			return nil, 0, nil, err
		}
		var snapshot pool.Snapshot
		engine, snapshot, err = s.pools.Snapshot(source.SnapshotID)
		fallback = snapshot.Size
	case source.VolumeID != "":
		var v pool.Volume
		if engine, v, release, err = s.holdSource(source.VolumeID); err != nil {
			return nil, 0, nil, err
		}
		fallback = v.Size
	default:
		engine, err = s.pools.Engine(poolName)
		return engine, request.DefaultSize, release, err
	}
	if err != nil {
		release()
		return nil, 0, nil, err
	}
	return engine, fallback, release, nil
}

// holdSource finds a volume that is to be cut or copied, and enters that.
func (s *Server) holdSource(id string) (pool.Engine, pool.Volume, func(), error) {
	engine, _, err := s.pools.Volume(id)
	if err != nil {
		return nil, pool.Volume{}, nil, err
	}
	op := pool.Copy
	if engine.Info().Reflink {
		op = pool.Cut
	}
	release, err := s.pools.Begin(id, op)
	if err != nil {
		return nil, pool.Volume{}, nil, err
	}
	engine, v, err := s.pools.Volume(id) // as it is now that it is held
	if err != nil {
		release()
		return nil, pool.Volume{}, nil, err
	}
	return engine, v, release, nil
}

// DeleteVolume implements csi.ControllerServer.
func (s *Server) DeleteVolume(ctx context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Delete)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, v, err := s.pools.Volume(r.GetVolumeId())
	if errors.Is(err, pool.ErrNotFound) {
		return &csi.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := engine.DeleteVolume(ctx, v.Name); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ControllerExpandVolume implements csi.ControllerServer. The node completes
// it: the device and the filesystem follow there, online.
func (s *Server) ControllerExpandVolume(ctx context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetCapacityRange() == nil {
		return nil, pool.Errorf(pool.ErrInvalid, "capacity_range is missing")
	}
	end, err := s.pools.Begin(r.GetVolumeId(), pool.Grow)
	if err != nil {
		return nil, err
	}
	defer end()
	engine, v, err := s.pools.Volume(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if c := r.GetVolumeCapability(); c != nil {
		if _, err := request.Suit(v, c); err != nil {
			return nil, err
		}
	}
	size, limit, err := request.Size(r.GetCapacityRange(), v.Size, v.Size)
	if err != nil {
		return nil, err
	}
	if limit > 0 && v.Size > limit {
		return nil, pool.Errorf(pool.ErrOutOfRange, "volume %s has %d bytes, more than limit_bytes %d; a volume never shrinks", v.ID, v.Size, limit)
	}
	if v, err = engine.GrowVolume(ctx, v.Name, size); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Size, NodeExpansionRequired: true}, nil
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (s *Server) ValidateVolumeCapabilities(_ context.Context, r *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, pool.Errorf(pool.ErrInvalid, "volume_capabilities is missing")
	}
	_, v, err := s.pools.Volume(r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	for _, c := range r.GetVolumeCapabilities() {
		if _, err := request.Suit(v, c); err != nil {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: request.Brief(err.Error())}, nil
		}
	}
	if _, err := request.ParseParameters(r.GetParameters()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: request.Brief(err.Error())}, nil
	}
	if _, err := request.ChangeLimits(v.Limits, r.GetMutableParameters()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: request.Brief(err.Error())}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      r.GetVolumeContext(),
		VolumeCapabilities: r.GetVolumeCapabilities(),
		Parameters:         r.GetParameters(),
		MutableParameters:  r.GetMutableParameters(),
	}}, nil
}

// ControllerGetVolume implements csi.ControllerServer.
func (s *Server) ControllerGetVolume(ctx context.Context, r *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	if s.pools.Holds(r.GetVolumeId()) {
		request.TellHoldsPool(ctx)
	}
	_, v, err := s.pools.Volume(r.GetVolumeId())
	if errors.Is(err, pool.ErrNotFound) {
		if id, parseErr := pool.ParseID(r.GetVolumeId()); parseErr == nil {
			err = cmp.Or(s.copies.Progress(id.Name), err)
		}
	}
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: s.volume(v),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{},
	}, nil
}

// ListVolumes implements csi.ControllerServer.
func (s *Server) ListVolumes(_ context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	most, err := pageSize(r.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	page, next, err := s.pools.Volumes(r.GetStartingToken(), most)
	if err != nil {
		return nil, err
	}
	response := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range page {
		response.Entries = append(response.Entries, &csi.ListVolumesResponse_Entry{
			Volume: s.volume(v),
			Status: &csi.ListVolumesResponse_VolumeStatus{},
		})
	}
	return response, nil
}

// pageSize checks the max_entries of a list; 0 is all.
func pageSize(entries int32) (int, error) {
	if entries < 0 {
		return 0, pool.Errorf(pool.ErrInvalid, "max_entries %d is negative", entries)
	}
	return int(entries), nil
}

// GetCapacity implements csi.ControllerServer.
func (s *Server) GetCapacity(ctx context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	parameters, err := request.ParseParameters(r.GetParameters())
	if err != nil {
		return nil, err
	}
	capability := request.Capability{Access: pool.AccessBlock}
	if len(r.GetVolumeCapabilities()) > 0 {
		if capability, err = request.ParseCapabilities(r.GetVolumeCapabilities()); err != nil {
			return nil, err
		}
	}
	fsType, _, err := request.Layout(capability, parameters)
	if err != nil {
		return nil, err
	}
	engine, err := s.pools.Engine(parameters.Pool)
	if errors.Is(err, pool.ErrNoSpace) || !request.Matches(r.GetAccessibleTopology(), s.segment) {
		return &csi.GetCapacityResponse{MaximumVolumeSize: wrapperspb.Int64(0)}, nil
	}
	capacity, err := engine.Capacity(ctx)
	if errors.Is(err, pool.ErrUnavailable) { // has no room, which keeps the scheduler away
		capacity, err = pool.Capacity{}, nil
	}
	if err != nil {
		return nil, err
	}
	available := capacity.Available
	if parameters.Provisioning == pool.Thick {
		available = capacity.Thick
	}
	available = available / pool.SizeUnit * pool.SizeUnit
	return &csi.GetCapacityResponse{
		AvailableCapacity: available,
		MaximumVolumeSize: wrapperspb.Int64(available),
		MinimumVolumeSize: wrapperspb.Int64(request.Smallest(capability.Access, fsType)),
	}, nil
}

// volume is the CSI form of a volume. There is no volume context: the node
// reads what it needs from the volume itself.
func (s *Server) volume(v pool.Volume) *csi.Volume {
	converted := &csi.Volume{
		VolumeId:           v.ID,
		CapacityBytes:      v.Size,
		AccessibleTopology: s.topology(),
	}
	switch {
	case v.Source.SnapshotID != "":
		converted.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.Source.SnapshotID},
		}}
	case v.Source.VolumeID != "":
		converted.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.Source.VolumeID},
		}}
	}
	return converted
}
