package request

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// limit is one mutable parameter, as a VolumeAttributesClass has it.
type limit struct {
	parameter string
	field     func(*pool.Limits) *int64
	least     int64
	most      int64
	unit      string
}

var limits = []limit{
	{"readIOPS", func(l *pool.Limits) *int64 { return &l.ReadIOPS }, pool.MinIOPS, pool.MaxIOPS, "operations a second"},
	{"writeIOPS", func(l *pool.Limits) *int64 { return &l.WriteIOPS }, pool.MinIOPS, pool.MaxIOPS, "operations a second"},
	{"readBandwidth", func(l *pool.Limits) *int64 { return &l.ReadBandwidth }, pool.MinBandwidth, pool.MaxBandwidth, "bytes a second"},
	{"writeBandwidth", func(l *pool.Limits) *int64 { return &l.WriteBandwidth }, pool.MinBandwidth, pool.MaxBandwidth, "bytes a second"},
}

// ChangeLimits gives what limits become of those that a volume has, by mutable
// parameters: one that is absent stays (CSI spec v1.13.0,
// ControllerModifyVolumeRequest.mutable_parameters), one that is empty is
// lifted.
func ChangeLimits(now pool.Limits, given map[string]string) (pool.Limits, error) {
	for key, value := range given {
		i := slices.IndexFunc(limits, func(l limit) bool { return l.parameter == key })
		if i < 0 {
			var known []string
			for _, l := range limits {
				known = append(known, l.parameter)
			}
			return pool.Limits{}, pool.Errorf(pool.ErrInvalid, "mutable parameter %.64q is unknown; the known ones are %s", key, strings.Join(known, ", "))
		}
		parsed, err := limits[i].parse(value)
		if err != nil {
			return pool.Limits{}, pool.Errorf(pool.ErrInvalid, "mutable parameter %s: %w", key, err)
		}
		*limits[i].field(&now) = parsed
	}
	return now, nil
}

func (l limit) parse(value string) (int64, error) {
	if value == "" {
		return 0, nil
	}
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return 0, pool.Errorf(pool.ErrInvalid, "%.64q is not a quantity such as 500, 2k or 10Mi", value)
	}
	// Value rounds a fraction up, and caps what is larger at the largest.
	n := q.Value()
	if n < l.least || n > l.most || q.CmpInt64(n) != 0 {
		return 0, pool.Errorf(pool.ErrInvalid, "%.64q is not a whole number from %d to %d of %s; an empty value lifts the limit", value, l.least, l.most, l.unit)
	}
	return n, nil
}
