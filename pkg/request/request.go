// Package request turns the fields of CSI requests into checked, typed values:
// capabilities, parameters, sizes and topology. Whatever it refuses, it refuses
// before anything was touched; it does no I/O.
package request

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// TopologyKey is the key of the one topology segment: the node. Its value is
// [pool.NodeSegment] of the node's name.
const TopologyKey = "topology.csi.orlop.dev/node"

// DefaultSize is the size of a volume for which none was asked, in bytes.
const DefaultSize = 1 << 30

// Required refuses a request that lacks a field.
func Required(field, value string) error {
	if value == "" {
		return pool.Errorf(pool.ErrInvalid, "%s is missing", field)
	}
	return nil
}

// Capability is how a volume is to be used.
type Capability struct {
	Access     pool.Access
	Filesystem filesystem.Type // for filesystem access; empty: none is named
	MountFlags []string
	Mode       csi.VolumeCapability_AccessMode_Mode
}

// SingleWriter reports whether the volume may be published at one path only.
func (c Capability) SingleWriter() bool {
	return c.Mode != csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
}

// ReadOnly reports whether the mode allows no writer at all.
func (c Capability) ReadOnly() bool {
	return c.Mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}

var modes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// ParseCapability checks one capability.
func ParseCapability(c *csi.VolumeCapability) (Capability, error) {
	parsed := Capability{Mode: c.GetAccessMode().GetMode()}
	if c == nil {
		return parsed, pool.Errorf(pool.ErrInvalid, "volume_capability is missing")
	}
	if !slices.Contains(modes, parsed.Mode) {
		return parsed, pool.Errorf(pool.ErrInvalid, "access mode %s: a volume lives on the disks of one node; use ReadWriteOnce or ReadWriteOncePod (SINGLE_NODE_...)", parsed.Mode)
	}
	switch c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		parsed.Access = pool.AccessBlock
	case *csi.VolumeCapability_Mount:
		fsType, err := parseFilesystem(c.GetMount().GetFsType())
		if err != nil {
			return parsed, pool.Errorf(pool.ErrInvalid, "volume_capability.mount.fs_type: %w", err)
		}
		parsed.Access = pool.AccessFilesystem
		parsed.Filesystem = fsType
		parsed.MountFlags = c.GetMount().GetMountFlags()
	default:
		return parsed, pool.Errorf(pool.ErrInvalid, "volume_capability has neither mount nor block access")
	}
	return parsed, nil
}

// parseFilesystem reads the name of a filesystem; no name stays none.
func parseFilesystem(name string) (filesystem.Type, error) {
	if name == "" {
		return "", nil
	}
	return filesystem.Parse(name)
}

// ParseCapabilities checks the capabilities of one volume, which must agree on
// the access type and the filesystem.
func ParseCapabilities(list []*csi.VolumeCapability) (Capability, error) {
	if len(list) == 0 {
		return Capability{}, pool.Errorf(pool.ErrInvalid, "volume_capabilities is missing")
	}
	first, err := ParseCapability(list[0])
	if err != nil {
		return Capability{}, err
	}
	for _, c := range list[1:] {
		next, err := ParseCapability(c)
		if err != nil {
			return Capability{}, err
		}
		if next.Access != first.Access {
			return Capability{}, pool.Errorf(pool.ErrInvalid, "volume_capabilities ask for %s and for %s access: one volume has one of them", first.Access, next.Access)
		}
		if !agree(next.Filesystem, first.Filesystem) {
			return Capability{}, pool.Errorf(pool.ErrInvalid, "volume_capabilities ask for %s and for %s: one volume has one filesystem", first.Filesystem, next.Filesystem)
		}
		first.Filesystem = cmp.Or(first.Filesystem, next.Filesystem)
	}
	return first, nil
}

// agree reports whether two names of filesystems are the same, or one is none.
func agree(a, b filesystem.Type) bool { return a == "" || b == "" || a == b }

// Suit checks one capability for a volume that exists: it must be what the
// volume was made for.
func Suit(v pool.Volume, c *csi.VolumeCapability) (Capability, error) {
	wanted, err := ParseCapability(c)
	if err != nil {
		return wanted, err
	}
	if wanted.Access != v.Access {
		return wanted, pool.Errorf(pool.ErrInvalid, "volume %s was made for %s access, not for %s", v.ID, v.Access, wanted.Access)
	}
	if fsType := c.GetMount().GetFsType(); fsType != "" && fsType != v.Filesystem {
		return wanted, pool.Errorf(pool.ErrInvalid, "volume %s has %s, not %s", v.ID, v.Filesystem, fsType)
	}
	return wanted, nil
}

// The parameters of a StorageClass, and of a CSI inline volume.
const (
	ParameterPool         = "pool"
	ParameterProvisioning = "provisioning"
	ParameterFilesystem   = "csi.storage.k8s.io/fstype"
	ParameterMkfsOptions  = "mkfsOptions"
	ParameterSize         = "size" // of an inline volume only
)

// kubernetesPrefix begins the parameters with which Kubernetes tells whom a
// volume is for. They are none of the driver's.
const kubernetesPrefix = "csi.storage.k8s.io/"

// Parameters are those of a StorageClass, checked.
type Parameters struct {
	Pool         string // empty: the default
	Provisioning pool.Provisioning
	Filesystem   filesystem.Type // empty: as the capability says
	MkfsOptions  string
	Size         int64 // bytes, for an inline volume; 0: none was given
}

// ParseParameters checks the parameters of a StorageClass.
func ParseParameters(given map[string]string) (Parameters, error) {
	return parse(given, false)
}

// ParseInlineParameters checks the volume attributes of a CSI inline volume.
func ParseInlineParameters(given map[string]string) (Parameters, error) {
	return parse(given, true)
}

// ParseSnapshotParameters checks the parameters of a VolumeSnapshotClass, of
// which there are none.
func ParseSnapshotParameters(given map[string]string) error {
	for key := range given {
		if !strings.HasPrefix(key, kubernetesPrefix) {
			return pool.Errorf(pool.ErrInvalid, "parameter %.64q is unknown; snapshots have none", key)
		}
	}
	return nil
}

func parse(given map[string]string, inline bool) (Parameters, error) {
	p := Parameters{Provisioning: pool.Thin}
	known := []string{ParameterPool, ParameterProvisioning, ParameterFilesystem, ParameterMkfsOptions}
	if inline {
		known = append(known, ParameterSize)
	}
	for key, value := range given {
		var err error
		switch {
		case key == ParameterPool:
			p.Pool = value
		case key == ParameterProvisioning:
			p.Provisioning, err = parseProvisioning(value)
		case key == ParameterFilesystem:
			p.Filesystem, err = parseFilesystem(value)
		case key == ParameterMkfsOptions:
			p.MkfsOptions = strings.Join(strings.Fields(value), " ")
		case key == ParameterSize && inline:
			p.Size, err = parseSize(value)
		case strings.HasPrefix(key, kubernetesPrefix):
		default:
			return Parameters{}, pool.Errorf(pool.ErrInvalid, "parameter %.64q is unknown; the known ones are %s", key, strings.Join(known, ", "))
		}
		if err != nil {
			return Parameters{}, pool.Errorf(pool.ErrInvalid, "parameter %s: %w", key, err)
		}
	}
	return p, nil
}

func parseProvisioning(value string) (pool.Provisioning, error) {
	switch p := pool.Provisioning(value); p {
	case pool.Thin, pool.Thick:
		return p, nil
	default:
		return "", pool.Errorf(pool.ErrInvalid, "%.64q is neither thin nor thick", value)
	}
}

func parseSize(value string) (int64, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return 0, pool.Errorf(pool.ErrInvalid, "%.64q is not a size such as 10Gi", value)
	}
	// Value rounds a fraction up, and caps what is larger at the largest.
	n := q.Value()
	if n <= 0 || n == math.MaxInt64 || q.CmpInt64(n) != 0 {
		return 0, pool.Errorf(pool.ErrInvalid, "%.64q is not a positive whole number of bytes", value)
	}
	return n, nil
}

// Layout settles what a volume is made as: what its capability asks for, what
// its parameters say, and whether the two agree.
func Layout(c Capability, p Parameters) (filesystem.Type, []string, error) {
	if c.Access == pool.AccessBlock {
		return "", nil, nil // a class may serve both kinds of volume
	}
	if !agree(c.Filesystem, p.Filesystem) {
		return "", nil, pool.Errorf(pool.ErrInvalid, "volume_capability asks for %s, parameter %s for %s", c.Filesystem, ParameterFilesystem, p.Filesystem)
	}
	fsType := cmp.Or(c.Filesystem, p.Filesystem, filesystem.Ext4)
	words := strings.Fields(p.MkfsOptions)
	if err := filesystem.ValidateOptions(fsType, words); err != nil {
		return "", nil, pool.Errorf(pool.ErrInvalid, "parameter %s: %w", ParameterMkfsOptions, err)
	}
	return fsType, words, nil
}

// Size settles a new volume's size in bytes: the least that is a multiple of
// pool.SizeUnit, at least smallest, and within the range; fallback is for a
// request that names no size. limit is the most the range allows, 0 for any.
func Size(r *csi.CapacityRange, smallest, fallback int64) (size, limit int64, err error) {
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case required < 0 || limit < 0:
		return 0, 0, pool.Errorf(pool.ErrOutOfRange, "capacity_range: %d to %d bytes: a size cannot be negative", required, limit)
	case limit > 0 && required > limit:
		return 0, 0, pool.Errorf(pool.ErrOutOfRange, "capacity_range: required_bytes %d is more than limit_bytes %d", required, limit)
	case required > math.MaxInt64-pool.SizeUnit:
		return 0, 0, pool.Errorf(pool.ErrOutOfRange, "capacity_range: required_bytes %d is more than any volume can have", required)
	}
	size = max(required, smallest)
	if required == 0 {
		size = max(fallback, smallest)
		if limit > 0 && size > limit {
			size = max(limit/pool.SizeUnit*pool.SizeUnit, smallest)
		}
	}
	size = (size + pool.SizeUnit - 1) / pool.SizeUnit * pool.SizeUnit
	if limit > 0 && size > limit {
		return 0, 0, pool.Errorf(pool.ErrOutOfRange, "capacity_range: no size in %d to %d bytes is possible: it must be a multiple of %d and at least %d", required, limit, pool.SizeUnit, smallest)
	}
	return size, limit, nil
}

// Smallest is the least size of a volume in bytes.
func Smallest(access pool.Access, fsType filesystem.Type) int64 {
	if access == pool.AccessBlock {
		return pool.SizeUnit
	}
	return fsType.MinSize()
}

// Reachable reports whether a topology requirement allows the node with that
// segment. Preferred topologies are a subset of the requisite ones; without
// those they are only wishes (CSI spec, TopologyRequirement).
func Reachable(t *csi.TopologyRequirement, segment string) bool {
	if len(t.GetRequisite()) == 0 {
		return true
	}
	for _, topology := range t.GetRequisite() {
		if Matches(topology, segment) {
			return true
		}
	}
	return false
}

// Matches reports whether a topology is that of the node with that segment. One
// that does not speak of nodes is everywhere.
func Matches(t *csi.Topology, segment string) bool {
	value, ok := t.GetSegments()[TopologyKey]
	return !ok || value == segment
}
