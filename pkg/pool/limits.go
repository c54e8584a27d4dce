package pool

// Limits bounds the I/O on a volume, of each pod that uses it. Zero is no limit.
type Limits struct {
	ReadIOPS       int64 `json:"readIOPS,omitempty"`       // operations a second
	WriteIOPS      int64 `json:"writeIOPS,omitempty"`      // operations a second
	ReadBandwidth  int64 `json:"readBandwidth,omitempty"`  // bytes a second
	WriteBandwidth int64 `json:"writeBandwidth,omitempty"` // bytes a second
}

// The bounds of limits. With less bandwidth than one block a second a volume
// would hang rather than be slow, and cgroup v2 takes no less than two
// operations (tg_set_limit in block/blk-throttle.c). The largest are more than any device has, and
// well below what makes the arithmetic of Linux before 6.6 overflow (commit
// e8368b57c006, "blk-throttle: check for overflow in calculate_bytes_allowed").
const (
	MinIOPS      = 2
	MaxIOPS      = 1_000_000_000
	MinBandwidth = SizeUnit
	MaxBandwidth = 1 << 40
)
