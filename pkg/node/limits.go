package node

import (
	"errors"
	"fmt"
	"slices"

	"github.com/orlop-csi/orlop/pkg/cgroup"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Limiter limits what a pod, by its UID, does on a block device (dev_t).
type Limiter interface {
	Limit(pod string, device uint64, limits cgroup.Limits) error
}

// podOf tells the UID of the pod that a target path is for, or nothing.
func podOf(target string) string {
	pod, _ := cgroup.Target(target)
	return pod
}

// volumeOf tells the name of the PersistentVolume likewise. That of a volume
// which Kubernetes had made is the one that CreateVolume was called with.
func volumeOf(target string) string {
	_, volume := cgroup.Target(target)
	return volume
}

// limit makes the volume's limits hold for the pod that the publication is for.
func (p publication) limit(device pool.Device) error {
	if p.volume.Limits == (pool.Limits{}) {
		return nil
	}
	return limit(p.limiter, p.volume, p.target, device)
}

func limit(l Limiter, v pool.Volume, target string, device pool.Device) error {
	pod := podOf(target)
	if pod == "" {
		return nil
	}
	err := l.Limit(pod, device.Number, cgroup.Limits(v.Limits))
	nowhere := errors.Is(err, cgroup.ErrNoPod) || errors.Is(err, cgroup.ErrUnsupported)
	switch {
	case nowhere && v.Limits == (pool.Limits{}):
		return nil
	case errors.Is(err, cgroup.ErrNoPod):
		return pool.Errorf(pool.ErrUnavailable, "limiting the I/O on volume %s: %w", v.ID, err)
	case errors.Is(err, cgroup.ErrUnsupported):
		return pool.Errorf(pool.ErrPrecondition, "limiting the I/O on volume %s: %w", v.ID, err)
	case err != nil:
		return fmt.Errorf("limiting the I/O on volume %s: %w", v.ID, err)
	}
	return nil
}

// EnforceLimits makes the limits of a volume, or that it has none any more, hold
// for all pods that use it.
func (s *Server) EnforceLimits(engine pool.Engine, v pool.Volume) error {
	all, err := uses(engine, v.Name)
	if err != nil {
		return err
	}
	var errs []error
	for _, u := range all {
		errs = append(errs, limit(s.limiter, v, u.Path, u.device))
	}
	return errors.Join(errs...)
}

// EnforceAllLimits does so for all volumes that have limits, after a restart. It
// gives what went wrong, of each volume.
func (s *Server) EnforceAllLimits() (errs []error) {
	for _, engine := range s.pools.Engines() {
		for _, v := range engine.Volumes("", 0) {
			if v.Limits == (pool.Limits{}) {
				continue
			}
			if err := s.EnforceLimits(engine, v); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errs
}

// lift takes the volume's limits off a pod that no longer uses it: the number of
// its device may be another volume's soon.
func (s *Server) lift(engine pool.Engine, name string, ended, remaining []use) error {
	v, err := engine.Volume(name)
	if err != nil || v.Limits == (pool.Limits{}) {
		return nil //nolint:nilerr // the user of a damaged volume must be able to leave
	}
	v.Limits = pool.Limits{}
	for _, u := range ended {
		same := func(r use) bool {
			return r.device.Number == u.device.Number && podOf(r.Path) == podOf(u.Path)
		}
		if slices.ContainsFunc(remaining, same) {
			continue
		}
		if err := limit(s.limiter, v, u.Path, u.device); err != nil {
			return err
		}
	}
	return nil
}
