package controller

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// elsewhere is a source that is not in the pool of the volume that is to be made
// of it, and has to be copied.
type elsewhere struct {
	order *peerapi.CopyOrder // of another node's; nil if it is in another pool of this one

	engine   pool.Engine // of this one's
	snapshot string      // ID, or
	volume   string      // ID
}

// elsewhere tells whether a new volume needs a copy of its source, and of what;
// nil is no. One that exists already needs none.
func (s *Server) elsewhere(requestName, poolName string, source pool.Source, order *peerapi.CopyOrder) *elsewhere {
	if _, _, err := s.pools.VolumeNamed(requestName); err == nil || source == (pool.Source{}) {
		return nil
	}
	engine, _, err := s.pools.Snapshot(source.SnapshotID)
	if source.VolumeID != "" {
		engine, _, err = s.pools.Volume(source.VolumeID)
	}
	switch {
	case errors.Is(err, pool.ErrNotFound) && order != nil:
		return &elsewhere{order: order}
	case err == nil && poolName != "" && engine.Info().Name != poolName:
		return &elsewhere{engine: engine, snapshot: source.SnapshotID, volume: source.VolumeID}
	default:
		return nil // an error comes out in the ordinary way
	}
}

// copyVolume makes a volume of a source that is elsewhere. spec gives what is to
// be made, by the size of the source.
func (s *Server) copyVolume(ctx context.Context, requestName, poolName string, from *elsewhere, spec func(size int64) (pool.VolumeSpec, error)) (v pool.Volume, err error) {
	target, err := s.pools.Engine(poolName)
	if err != nil {
		return pool.Volume{}, err
	}
	var where string
	if from.order != nil {
		where = "node " + from.order.GetNode()
	} else {
		where = "pool " + from.engine.Info().Name
	}
	ctx, one, end := s.copies.Begin(ctx, requestName, where, from.order)
	defer func() { end(err) }()
	open := one.Remote
	if from.order == nil {
		open = func(ctx context.Context) (*pool.Remote, func(), error) {
			return s.local(ctx, requestName, from, one.Advance)
		}
	}
	remote, done, err := open(ctx)
	if err != nil {
		return pool.Volume{}, err
	}
	defer done()
	wanted, err := spec(remote.Size)
	if err != nil {
		return pool.Volume{}, err
	}
	wanted.Remote = remote
	return target.CreateVolume(ctx, wanted)
}

// local opens a source in another pool of this node. Of a volume, a snapshot is
// cut for it.
func (s *Server) local(ctx context.Context, requestName string, from *elsewhere, advance func(done, size int64)) (remote *pool.Remote, done func(), err error) {
	done = func() {}
	id := from.snapshot
	if from.volume != "" {
		cut, err := s.cutForCopy(ctx, requestName, from.volume)
		if err != nil {
			return nil, nil, err
		}
		id = cut.ID
		done = func() {
			// One that stays goes when nobody has used it for a while.
			_ = s.deleteSnapshot(context.WithoutCancel(ctx), id)
		}
	}
	release, err := s.holdSnapshot(id, pool.Copy)
	if err != nil {
		done()
		return nil, nil, err
	}
	remove := done
	done = func() {
		release()
		remove()
	}
	engine, snapshot, err := s.pools.Snapshot(id)
	if err != nil {
		done()
		return nil, nil, err
	}
	return &pool.Remote{
		Size:    snapshot.Size,
		Content: snapshot.Content,
		Created: snapshot.Created.UnixNano(),
		Read: func(ctx context.Context, offset int64) iter.Seq2[pool.Piece, error] {
			return func(yield func(pool.Piece, error) bool) {
				for piece, err := range engine.Read(ctx, snapshot.Name, offset) {
					advance(piece.Offset, snapshot.Size)
					if !yield(piece, err) {
						return
					}
				}
			}
		},
	}, done, nil
}

// cutForCopy cuts the snapshot of a volume of this node that another pool's is to
// be copied from.
func (s *Server) cutForCopy(ctx context.Context, requestName, volumeID string) (pool.Snapshot, error) {
	engine, v, release, err := s.holdSource(volumeID)
	if err != nil {
		return pool.Snapshot{}, err
	}
	defer release()
	name := request.CopyName(requestName)
	end, err := s.pools.BeginSnapshot(pool.NameFor(name), pool.Create)
	if err != nil {
		return pool.Snapshot{}, err
	}
	defer end()
	s.copies.Use(pool.NameFor(name))
	return engine.CreateSnapshot(ctx, pool.SnapshotSpec{RequestName: name, Volume: v.Name, ForCopy: true})
}

// sweepEvery is how often what nobody asks for is looked for, at least.
const sweepEvery = time.Minute

// sweepCopies drops the copies, and the snapshots for copying, that nobody asks
// for any more.
func (s *Server) sweepCopies() {
	ticker := time.NewTicker(max(min(s.copies.Abandon()/4, sweepEvery), 10*time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-s.alive.Done():
			return
		case now := <-ticker.C:
			s.copies.Sweep(now)
			for _, e := range s.pools.Engines() {
				s.sweepPool(e, now)
			}
		}
	}
}

func (s *Server) sweepPool(e pool.Engine, now time.Time) {
	for _, name := range e.Copies() {
		if s.copies.Wanted(name, now) {
			continue
		}
		end, err := s.pools.BeginNamed(name, pool.Delete)
		if err != nil {
			continue // it is being asked for just now
		}
		if err := e.DropCopy(name); err == nil {
			s.copies.Forget(name)
		}
		end()
	}
	for _, snapshot := range e.Snapshots("", 0) {
		if !snapshot.ForCopy || s.copies.Wanted(snapshot.Name, now) {
			continue
		}
		if err := s.deleteSnapshot(s.alive, snapshot.ID); err == nil {
			s.copies.Forget(snapshot.Name)
		}
	}
}
