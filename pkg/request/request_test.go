package request

import (
	"errors"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/pool"
)

type mode = csi.VolumeCapability_AccessMode_Mode

const (
	writer       = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	reader       = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	singleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	multiWriter  = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
)

func mount(fsType string, m mode, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: m},
	}
}

func block(m mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: m},
	}
}

// mustBe fails the test unless err is of that kind and says all the words.
func mustBe(t *testing.T, rule string, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v; want %v", rule, err, kind)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %q does not say %q", rule, err, word)
		}
	}
}

func TestEveryAccessModeOfOneNodeIsAccepted(t *testing.T) {
	for _, c := range []struct {
		mode                   mode
		singleWriter, readOnly bool
	}{
		{writer, true, false},
		{singleWriter, true, false},
		{multiWriter, false, false},
		{reader, true, true},
	} {
		for _, capability := range []*csi.VolumeCapability{mount("", c.mode), block(c.mode)} {
			got, err := ParseCapability(capability)
			if err != nil || got.Mode != c.mode || got.SingleWriter() != c.singleWriter || got.ReadOnly() != c.readOnly {
				t.Errorf("%s: %+v, %v", c.mode, got, err)
			}
		}
	}
}

// All modes of the specification but those of one node, also ones that it may
// get later.
func TestEveryOtherAccessModeIsRefused(t *testing.T) {
	for n := range int32(20) {
		m := mode(n)
		if slices.Contains([]mode{writer, reader, singleWriter, multiWriter}, m) {
			continue
		}
		_, err := ParseCapability(block(m))
		mustBe(t, m.String(), err, pool.ErrInvalid, m.String(), "ReadWriteOnce")
	}
}

func TestACapabilityHasOneKindOfAccess(t *testing.T) {
	for rule, c := range map[string]*csi.VolumeCapability{
		"nothing":      nil,
		"no mode":      {AccessType: block(writer).AccessType},
		"no access":    {AccessMode: block(writer).AccessMode},
		"unknown ntfs": mount("ntfs", writer),
		"upper case":   mount("EXT4", writer),
		"older ext3":   mount("ext3", writer),
		"a path":       mount("../ext4", writer),
	} {
		_, err := ParseCapability(c)
		mustBe(t, rule, err, pool.ErrInvalid)
	}
	got, err := ParseCapability(mount("xfs", writer, "noatime", "discard"))
	if err != nil || got.Access != pool.AccessFilesystem || got.Filesystem != filesystem.XFS || !slices.Equal(got.MountFlags, []string{"noatime", "discard"}) {
		t.Errorf("mount: %+v, %v", got, err)
	}
	got, err = ParseCapability(block(writer))
	if err != nil || got.Access != pool.AccessBlock || got.Filesystem != "" || got.MountFlags != nil {
		t.Errorf("block: %+v, %v", got, err)
	}
}

func TestTheCapabilitiesOfAVolumeAgree(t *testing.T) {
	for _, c := range []struct {
		rule string
		list []*csi.VolumeCapability
		want filesystem.Type
		ok   bool
	}{
		{"none", nil, "", false},
		{"one", []*csi.VolumeCapability{mount("btrfs", writer)}, filesystem.Btrfs, true},
		{"two modes", []*csi.VolumeCapability{mount("xfs", writer), mount("xfs", reader)}, filesystem.XFS, true},
		{"one names the filesystem", []*csi.VolumeCapability{mount("", writer), mount("xfs", reader)}, filesystem.XFS, true},
		{"the other names the filesystem", []*csi.VolumeCapability{mount("xfs", writer), mount("", reader)}, filesystem.XFS, true},
		{"two block", []*csi.VolumeCapability{block(writer), block(reader)}, "", true},
		{"two filesystems", []*csi.VolumeCapability{mount("xfs", writer), mount("ext4", writer)}, "", false},
		{"two filesystems and one unnamed between", []*csi.VolumeCapability{mount("xfs", writer), mount("", writer), mount("ext4", writer)}, "", false},
		{"mount and block", []*csi.VolumeCapability{mount("", writer), block(writer)}, "", false},
		{"block and mount", []*csi.VolumeCapability{block(writer), mount("", writer)}, "", false},
		{"one that is refused", []*csi.VolumeCapability{block(writer), block(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}, "", false},
		{"one that is missing", []*csi.VolumeCapability{block(writer), nil}, "", false},
	} {
		got, err := ParseCapabilities(c.list)
		if !c.ok {
			mustBe(t, c.rule, err, pool.ErrInvalid)
			continue
		}
		if err != nil || got.Filesystem != c.want {
			t.Errorf("%s: %+v, %v", c.rule, got, err)
		}
	}
}

func TestTheParametersOfAStorageClass(t *testing.T) {
	for _, c := range []struct {
		rule  string
		given map[string]string
		want  Parameters
	}{
		{"none", nil, Parameters{Provisioning: pool.Thin}},
		{
			"all",
			map[string]string{"pool": "fast", "provisioning": "thick", "csi.storage.k8s.io/fstype": "xfs", "mkfsOptions": "  -m\treflink=0  -L  data\n"},
			Parameters{Pool: "fast", Provisioning: pool.Thick, Filesystem: filesystem.XFS, MkfsOptions: "-m reflink=0 -L data"},
		},
		{"an empty filesystem is none", map[string]string{"csi.storage.k8s.io/fstype": ""}, Parameters{Provisioning: pool.Thin}},
		{
			"what Kubernetes tells is not the driver's",
			map[string]string{"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pv/name": "pv", "csi.storage.k8s.io/anything": "else"},
			Parameters{Provisioning: pool.Thin},
		},
	} {
		if got, err := ParseParameters(c.given); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.rule, got, err, c.want)
		}
	}
}

func TestABadParameterIsRefusedByName(t *testing.T) {
	for _, c := range []struct{ key, value string }{
		{"provisioning", ""},
		{"provisioning", "Thick"},
		{"provisioning", "thin,thick"},
		{"csi.storage.k8s.io/fstype", "ntfs"},
		{"csi.storage.k8s.io/fstype", "ext4 "},
	} {
		_, err := ParseParameters(map[string]string{c.key: c.value})
		mustBe(t, c.key+"="+c.value, err, pool.ErrInvalid, c.key)
	}
}

func TestAnUnknownParameterIsRefusedWithTheKnownOnes(t *testing.T) {
	for _, key := range []string{"Pool", "fstype", "fsType", "type", "size", "", "mkfsoptions", "pool ", "csi.storage.k8s.io", strings.Repeat("k", 1000)} {
		_, err := ParseParameters(map[string]string{key: "x"})
		mustBe(t, key, err, pool.ErrInvalid, "pool", "provisioning", "csi.storage.k8s.io/fstype", "mkfsOptions")
		if err != nil && len(err.Error()) > 300 {
			t.Errorf("the error about %.20q... has %d bytes", key, len(err.Error()))
		}
	}
}

func TestAnInlineVolumeHasASizeToo(t *testing.T) {
	for value, want := range map[string]int64{"1": 1, "4096": 4096, "10Gi": 10 << 30, "10G": 10_000_000_000, "1.5Ki": 1536, "1e3": 1000} {
		if got, err := ParseInlineParameters(map[string]string{"size": value}); err != nil || got.Size != want {
			t.Errorf("size %s: %d, %v; want %d", value, got.Size, err, want)
		}
	}
	for _, value := range []string{"", "0", "-1Gi", "ten", "10GiB", "0.5", "9Ei", "1e30", "NaN"} {
		_, err := ParseInlineParameters(map[string]string{"size": value})
		mustBe(t, "size "+value, err, pool.ErrInvalid, "size")
	}
	_, err := ParseInlineParameters(map[string]string{"sizes": "1Gi"})
	mustBe(t, "sizes", err, pool.ErrInvalid, "pool", "provisioning", "csi.storage.k8s.io/fstype", "mkfsOptions", "size")
}

func TestASnapshotHasNoParameters(t *testing.T) {
	if err := ParseSnapshotParameters(map[string]string{"csi.storage.k8s.io/volumesnapshot/name": "s"}); err != nil {
		t.Errorf("what Kubernetes tells: %v", err)
	}
	mustBe(t, "pool", ParseSnapshotParameters(map[string]string{"pool": "fast"}), pool.ErrInvalid, "pool")
}

func TestTheFilesystemComesFromTheCapabilityOrTheParameter(t *testing.T) {
	for _, c := range []struct {
		capability, parameter, want filesystem.Type
	}{
		{"", "", filesystem.Ext4},
		{filesystem.XFS, "", filesystem.XFS},
		{"", filesystem.Btrfs, filesystem.Btrfs},
		{filesystem.XFS, filesystem.XFS, filesystem.XFS},
		{filesystem.XFS, filesystem.Ext4, "refused"},
		{filesystem.Ext4, filesystem.XFS, "refused"},
	} {
		got, _, err := Layout(Capability{Access: pool.AccessFilesystem, Filesystem: c.capability}, Parameters{Filesystem: c.parameter})
		if c.want == "refused" {
			mustBe(t, "both", err, pool.ErrInvalid, string(c.capability), string(c.parameter))
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("capability %q and parameter %q: %s, %v; want %s", c.capability, c.parameter, got, err, c.want)
		}
	}
}

func TestABlockVolumeHasNoFilesystemWhateverItsClassSays(t *testing.T) {
	fsType, mkfs, err := Layout(Capability{Access: pool.AccessBlock}, Parameters{Filesystem: filesystem.XFS, MkfsOptions: "-m reflink=0"})
	if err != nil || fsType != "" || mkfs != nil {
		t.Errorf("Layout = %q, %q, %v", fsType, mkfs, err)
	}
}

// What each mkfs may be told is tested in package filesystem; here, that it is
// asked at all.
func TestMkfsOptionsCannotLeadElsewhere(t *testing.T) {
	ext4 := Capability{Access: pool.AccessFilesystem, Filesystem: filesystem.Ext4}
	if _, words, err := Layout(ext4, Parameters{MkfsOptions: "-i 8192 -O ^has_journal"}); err != nil || !slices.Equal(words, []string{"-i", "8192", "-O", "^has_journal"}) {
		t.Errorf("Layout = %q, %v", words, err)
	}
	for _, options := range []string{"/dev/sda", "-L /dev/sda", "-J device=UUID=1", "-d ../../etc", "-U random", "-F", "-n", "--", "-L"} {
		_, _, err := Layout(ext4, Parameters{MkfsOptions: options})
		mustBe(t, options, err, pool.ErrInvalid, "mkfsOptions")
	}
}

func TestASizeIsTheLeastThatSuits(t *testing.T) {
	const unit, huge = pool.SizeUnit, math.MaxInt64
	for _, c := range []struct {
		rule                                string
		required, limit, smallest, fallback int64
		want                                int64
	}{
		{"none is asked for", 0, 0, unit, 1 << 30, 1 << 30},
		{"the fallback is too small", 0, 0, 8 << 20, 1 << 20, 8 << 20},
		{"only a limit, above the fallback", 0, 2 << 30, unit, 1 << 30, 1 << 30},
		{"only a limit, below the fallback", 0, 10_000, unit, 1 << 30, 8192},
		{"only a limit, which is the smallest", 0, 8 << 20, 8 << 20, 1 << 30, 8 << 20},
		{"rounded up", 1, 0, unit, 1 << 30, unit},
		{"rounded up by almost a unit", unit + 1, 0, unit, 1 << 30, 2 * unit},
		{"exact", 5 * unit, 5 * unit, unit, 1 << 30, 5 * unit},
		{"raised to the smallest", unit, 0, 300 << 20, 1 << 30, 300 << 20},
		{"the smallest is rounded too", 1, 0, unit + 1, 1 << 30, 2 * unit},
		{"rounded up to the limit", 5*unit - 1, 5 * unit, unit, 1 << 30, 5 * unit},
		{"the largest", huge - unit, 0, unit, 1 << 30, huge - unit + 1},
		{"the largest with a limit", huge - unit, huge, unit, 1 << 30, huge - unit + 1},
	} {
		r := &csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}
		size, limit, err := Size(r, c.smallest, c.fallback)
		if err != nil || size != c.want || limit != c.limit {
			t.Errorf("%s: %d, %d, %v; want %d, %d", c.rule, size, limit, err, c.want, c.limit)
		}
	}
	if size, limit, err := Size(nil, unit, 1<<30); err != nil || size != 1<<30 || limit != 0 {
		t.Errorf("no range: %d, %d, %v", size, limit, err)
	}
}

func TestASizeThatCannotBeIsOutOfRange(t *testing.T) {
	const unit, huge = pool.SizeUnit, math.MaxInt64
	for _, c := range []struct {
		rule                      string
		required, limit, smallest int64
	}{
		{"negative", -1, 0, unit},
		{"as negative as can be", math.MinInt64, 0, unit},
		{"a negative limit", 0, -1, unit},
		{"the limit is below", 2 * unit, unit, unit},
		{"no multiple between", unit + 1, 2*unit - 1, unit},
		{"one size that is no multiple", 5000, 5000, unit},
		{"a limit below the unit", 0, unit - 1, unit},
		{"a limit below the smallest", unit, 8<<20 - 1, 8 << 20},
		{"only a limit, below the smallest", 0, 8<<20 - 1, 8 << 20},
		{"rounding would overflow", huge - unit + 1, 0, unit},
		{"the largest number", huge, 0, unit},
		{"the largest range", huge, huge, unit},
	} {
		r := &csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}
		size, _, err := Size(r, c.smallest, 1<<30)
		mustBe(t, c.rule, err, pool.ErrOutOfRange, "capacity_range")
		if size != 0 {
			t.Errorf("%s: %d", c.rule, size)
		}
	}
}

func TestAVolumeIsNoSmallerThanItsFilesystem(t *testing.T) {
	if got := Smallest(pool.AccessBlock, ""); got != pool.SizeUnit {
		t.Errorf("block: %d", got)
	}
	for _, fsType := range []filesystem.Type{filesystem.Ext4, filesystem.XFS, filesystem.Btrfs} {
		if got := Smallest(pool.AccessFilesystem, fsType); got != fsType.MinSize() || got%pool.SizeUnit != 0 {
			t.Errorf("%s: %d", fsType, got)
		}
	}
}

func segments(pairs ...string) *csi.Topology {
	t := &csi.Topology{Segments: map[string]string{}}
	for i := 0; i < len(pairs); i += 2 {
		t.Segments[pairs[i]] = pairs[i+1]
	}
	return t
}

func TestATopologyAllowsANode(t *testing.T) {
	here, there := segments(TopologyKey, "node-1"), segments(TopologyKey, "node-2")
	for _, c := range []struct {
		rule string
		t    *csi.TopologyRequirement
		want bool
	}{
		{"none is asked for", nil, true},
		{"nothing in it", &csi.TopologyRequirement{}, true},
		{"here", &csi.TopologyRequirement{Requisite: []*csi.Topology{here}}, true},
		{"elsewhere", &csi.TopologyRequirement{Requisite: []*csi.Topology{there}}, false},
		{"here or elsewhere", &csi.TopologyRequirement{Requisite: []*csi.Topology{there, here}}, true},
		{"a preference is only a wish", &csi.TopologyRequirement{Preferred: []*csi.Topology{there}}, true},
		{"a preference does not allow", &csi.TopologyRequirement{Requisite: []*csi.Topology{there}, Preferred: []*csi.Topology{here}}, false},
		{"a zone says nothing of nodes", &csi.TopologyRequirement{Requisite: []*csi.Topology{segments("zone", "z")}}, true},
		{"a zone and elsewhere", &csi.TopologyRequirement{Requisite: []*csi.Topology{segments("zone", "z", TopologyKey, "node-2")}}, false},
		{"a node without a name", &csi.TopologyRequirement{Requisite: []*csi.Topology{segments(TopologyKey, "")}}, false},
	} {
		if got := Reachable(c.t, "node-1"); got != c.want {
			t.Errorf("%s: %v", c.rule, got)
		}
	}
	if !Matches(nil, "node-1") || !Matches(here, "node-1") || Matches(there, "node-1") {
		t.Error("Matches: no topology is everywhere, one is where it says")
	}
}

func TestHealthTellsAStatusAndAReasonOnce(t *testing.T) {
	got := Health("v", []pool.Condition{
		{Severity: pool.Degraded, Reason: "A", Message: "one"},
		{Severity: pool.DataLoss, Reason: "A", Message: "two"},
		{Severity: pool.Degraded, Reason: "A", Message: "three"},
		{Severity: pool.Inaccessible, Reason: "B", Message: "four"},
	})
	var told []string
	for _, h := range got.GetHealthStatuses() {
		told = append(told, h.GetStatus().String()+" "+h.GetReason()+" "+h.GetMessage())
	}
	want := []string{"DEGRADED A one; three", "DATA_LOSS A two", "INACCESSIBLE B four"}
	if got.GetVolumeId() != "v" || !slices.Equal(told, want) {
		t.Errorf("%s: %q, want %q", got.GetVolumeId(), told, want)
	}
	if healthy := Health("v", nil); healthy.GetVolumeId() != "v" || len(healthy.GetHealthStatuses()) != 0 {
		t.Errorf("a healthy volume: %v", healthy)
	}
}

func TestAPoolsHealthIsThatOfTheNodesStorage(t *testing.T) {
	got := StorageHealth([]pool.Condition{
		{Severity: pool.Degraded, Reason: "A", Message: "one"},
		{Severity: pool.Inaccessible, Reason: "B", Message: "two"},
		{Severity: pool.DataLoss, Reason: "C", Message: "three"},
		{Severity: pool.Degraded, Reason: "A", Message: "four"},
	})
	var told []string
	for _, h := range got {
		told = append(told, h.GetStatus().String()+" "+h.GetReason()+" "+h.GetMessage())
	}
	want := []string{"STORAGE_DEGRADED A one; four", "STORAGE_UNREACHABLE B two", "STORAGE_UNREACHABLE C three"}
	if !slices.Equal(told, want) {
		t.Errorf("%q, want %q", told, want)
	}
}

func FuzzParameters(f *testing.F) {
	for _, key := range []string{"pool", "provisioning", "csi.storage.k8s.io/fstype", "mkfsOptions", "size", "csi.storage.k8s.io/pvc/name", "Pool", "", "\x00"} {
		for _, value := range []string{"", "default", "thin", "thick", "xfs", "-m reflink=0", "-L /etc", "10Gi", "-1", "9Ei", "1e99", "\x00", "../..", strings.Repeat("9", 100)} {
			f.Add(key, value, "provisioning", "thick", "btrfs")
			f.Add(key, value, key, value, "")
		}
	}
	known := []string{ParameterPool, ParameterProvisioning, ParameterFilesystem, ParameterMkfsOptions, ParameterSize}
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2, fsType string) {
		given := map[string]string{key1: value1, key2: value2}
		before := maps.Clone(given)
		for what, parse := range map[string]func(map[string]string) (Parameters, error){"class": ParseParameters, "inline": ParseInlineParameters} {
			p, err := parse(given)
			if !maps.Equal(given, before) {
				t.Fatalf("%s: the request was changed to %q", what, given)
			}
			if err != nil {
				if !errors.Is(err, pool.ErrInvalid) {
					t.Errorf("%s of %q: %v", what, given, err)
				}
				continue
			}
			for key := range given {
				if !slices.Contains(known, key) && !strings.HasPrefix(key, "csi.storage.k8s.io/") {
					t.Errorf("%s: parameter %q was accepted", what, key)
				}
			}
			if p.Provisioning != pool.Thin && p.Provisioning != pool.Thick || p.Size < 0 || what == "class" && p.Size != 0 {
				t.Errorf("%s of %q: %+v", what, given, p)
			}
			c, err := ParseCapability(mount(fsType, writer))
			if err != nil {
				continue
			}
			got, words, err := Layout(c, p)
			if err != nil {
				if !errors.Is(err, pool.ErrInvalid) {
					t.Errorf("%s: layout of %q: %v", what, given, err)
				}
				continue
			}
			if got.MinSize() <= 0 || strings.ContainsAny(strings.Join(words, " "), "/\x00\n") {
				t.Errorf("%s of %q: %s, %q", what, given, got, words)
			}
		}
	})
}
