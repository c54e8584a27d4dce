package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// state is what FILE.json remembers of FILE.
type state struct {
	Volume   string `json:"volume"`
	Capacity int64  `json:"capacity"`           // bytes
	Snapshot string `json:"snapshot,omitempty"` // that FILE is equal to, unless Pending has begun
	Pending  string `json:"pending,omitempty"`  // name of the snapshot that is being copied
	// Begun is when the pending snapshot was cut, once anything of it may be
	// in FILE. From then on FILE can only become equal to that very snapshot:
	// the changes from Snapshot to yet another would not name a block that
	// the pending one had changed, and that was changed back.
	Begun    time.Time `json:"begun,omitzero"`
	Obsolete string    `json:"obsolete,omitempty"` // a snapshot to delete
}

func stateFile(file string) string { return file + ".json" }

func readState(file string) (s state, err error) {
	data, err := os.ReadFile(stateFile(file))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(file); err == nil {
			return s, fmt.Errorf("%s exists, and %s, which tells what it is, does not", file, stateFile(file))
		}
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("%s: %w", stateFile(file), err)
	}
	return s, nil
}

// write brings the state to stable storage.
func (s *state) write(file string) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	staged := stateFile(file) + ".new"
	f, err := os.OpenFile(staged, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(staged, stateFile(file)); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// report is what a save did.
type report struct {
	full             bool
	capacity, copied int64 // bytes
	ranges           int
	took             time.Duration
	verified         bool
}

func (r report) String() string {
	kind, verified := "changed", ""
	if r.full {
		kind = "allocated"
	}
	if r.verified {
		verified = "; verified: equal byte for byte"
	}
	return fmt.Sprintf("copied %d of %d bytes (%s, in %d ranges) in %s%s", r.copied, r.capacity, kind, r.ranges, r.took.Round(time.Millisecond), verified)
}

// save makes a file equal to a volume.
func save(ctx context.Context, d *driver, volume, file string, verify bool) (r report, err error) {
	begin := time.Now()
	s, err := readState(file)
	if err != nil {
		return r, err
	}
	if s.Volume != "" && s.Volume != volume {
		return r, fmt.Errorf("%s is a copy of volume %s", file, s.Volume)
	}
	s.Volume = volume
	if err := s.forget(ctx, d, file); err != nil {
		return r, err
	}

	// The name is remembered before there is a snapshot of that name, so that
	// none is ever left behind.
	if s.Pending == "" {
		s.Pending = "backup-" + strings.ToLower(rand.Text()[:16])
		if err := s.write(file); err != nil {
			return r, err
		}
	}
	snapshot, err := d.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: s.Pending, SourceVolumeId: volume})
	if err != nil {
		return r, fmt.Errorf("snapshot of %s: %w", volume, err)
	}
	target, cut := snapshot.GetSnapshot().GetSnapshotId(), snapshot.GetSnapshot().GetCreationTime().AsTime()
	base := s.Snapshot
	if !s.Begun.IsZero() && !s.Begun.Equal(cut) {
		base = "" // what is in the file is not known any more
	}
	s.Begun = cut
	if err := s.write(file); err != nil {
		return r, err
	}

	r, err = d.copyTo(ctx, file, base, target, s.Pending, verify)
	if code := status.Code(err); base != "" && (code == codes.NotFound || code == codes.FailedPrecondition) {
		// The base is gone, or cannot be compared with: all of it, then.
		r, err = d.copyTo(ctx, file, "", target, s.Pending, verify)
	}
	if err != nil {
		return r, err
	}
	done := state{Volume: volume, Capacity: r.capacity, Snapshot: target, Obsolete: s.Snapshot}
	if err := done.write(file); err != nil {
		return r, err
	}
	r.took = time.Since(begin)
	return r, done.forget(ctx, d, file)
}

// forget deletes the snapshot that is of no use any more.
func (s *state) forget(ctx context.Context, d *driver, file string) error {
	if s.Obsolete == "" {
		return nil
	}
	if err := d.deleteSnapshot(ctx, s.Obsolete); err != nil {
		return fmt.Errorf("deleting snapshot %s, which has had its day: %w", s.Obsolete, err)
	}
	s.Obsolete = ""
	return s.write(file)
}

// copyTo copies to the file what changed in the target since the base or, if
// there is none, all that is allocated.
func (d *driver) copyTo(ctx context.Context, file, base, target, name string, verify bool) (r report, err error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return r, err
	}
	defer f.Close()
	r.full = base == ""
	if r.full { // what is not allocated is zeros
		if err := f.Truncate(0); err != nil {
			return r, err
		}
	}

	// To be read, a snapshot becomes a volume, which shares its blocks.
	source := &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: target},
	}}
	created, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name + "-read", VolumeCapabilities: []*csi.VolumeCapability{capability()}, VolumeContentSource: source,
	})
	if err != nil {
		return r, fmt.Errorf("making a volume of snapshot %s: %w", target, err)
	}
	reader := created.GetVolume().GetVolumeId()
	defer func() {
		deleteErr := d.deleteVolume(context.WithoutCancel(ctx), reader)
		err = cmp.Or(err, deleteErr)
	}()
	err = d.use(ctx, reader, file+".volume", func(path string) error {
		device, err := os.Open(path)
		if err != nil {
			return err
		}
		defer device.Close()
		buffer := make([]byte, piece)
		r.capacity, err = d.changes(ctx, base, target, func(off, n int64) error {
			r.ranges++
			r.copied += n
			return copyRange(ctx, f, device, off, n, buffer)
		})
		if err != nil {
			return err
		}
		if err := f.Truncate(r.capacity); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if verify {
			r.verified = true
			return equal(ctx, f, device, r.capacity)
		}
		return nil
	})
	return r, err
}
