package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func mount(fsType string, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{
		Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags},
	}}
}

func TestFieldsOverTheSpecificationsLimitAreRefusedByName(t *testing.T) {
	text := func(n int) string { return strings.Repeat("x", n) }
	pair := func(n int) map[string]string { return map[string]string{"k": text(n - 1)} }
	for name, test := range map[string]struct {
		request proto.Message
		want    string // no error if empty
	}{
		"nothing":               {&csi.CreateVolumeRequest{}, ""},
		"name of 128 bytes":     {&csi.CreateVolumeRequest{Name: text(128)}, ""},
		"name of 129 bytes":     {&csi.CreateVolumeRequest{Name: text(129)}, "name has 129 bytes; the limit is 128"},
		"bytes, not characters": {&csi.CreateVolumeRequest{Name: strings.Repeat("é", 65)}, "name has 130 bytes; the limit is 128"},
		"snapshot's name":       {&csi.CreateSnapshotRequest{Name: text(129)}, "name has 129 bytes; the limit is 128"},

		"any language":             {&csi.CreateVolumeRequest{Name: "größe Ελλάδα 🐳"}, ""},
		"blanks that are allowed":  {&csi.CreateVolumeRequest{Name: "a\tb\nc\rd"}, ""},
		"path-like name":           {&csi.CreateVolumeRequest{Name: "../../etc"}, ""},
		"NUL in a name":            {&csi.CreateVolumeRequest{Name: "a\x00b"}, `name "a\x00b" holds a control character`},
		"backspace in a name":      {&csi.CreateVolumeRequest{Name: "\b"}, `name "\b" holds a control character`},
		"vertical tab in a name":   {&csi.CreateVolumeRequest{Name: "\v"}, `name "\v" holds a control character`},
		"escape in a name":         {&csi.CreateSnapshotRequest{Name: "\x1b[2J"}, `name "\x1b[2J" holds a control character`},
		"delete in a name":         {&csi.CreateVolumeRequest{Name: "\x7f"}, `name "\x7f" holds a control character`},
		"C1 control in a name":     {&csi.CreateVolumeRequest{Name: "\u0085"}, `name "\u0085" holds a control character`},
		"the first after controls": {&csi.CreateVolumeRequest{Name: "\u00a0"}, ""},

		"map of 4 KiB":         {&csi.CreateVolumeRequest{Parameters: pair(4096)}, ""},
		"map of more":          {&csi.CreateVolumeRequest{Parameters: pair(4097)}, "parameters has 4097 bytes; the limit is 4096"},
		"secrets of more":      {&csi.NodeStageVolumeRequest{Secrets: pair(4097)}, "secrets has 4097 bytes; the limit is 4096"},
		"context of more":      {&csi.NodePublishVolumeRequest{VolumeContext: pair(4097)}, "volume_context has 4097 bytes; the limit is 4096"},
		"long value in a map":  {&csi.NodePublishVolumeRequest{VolumeContext: pair(1000)}, ""},
		"topology of more":     {&csi.CreateVolumeRequest{AccessibilityRequirements: &csi.TopologyRequirement{Preferred: []*csi.Topology{{}, {Segments: pair(4097)}}}}, "accessibility_requirements.preferred[1].segments has 4097 bytes; the limit is 4096"},
		"filesystem type":      {&csi.CreateVolumeRequest{VolumeCapabilities: []*csi.VolumeCapability{mount("ext4"), mount(text(129))}}, "volume_capabilities[1].mount.fs_type has 129 bytes; the limit is 128"},
		"one long mount flag":  {&csi.NodeStageVolumeRequest{VolumeCapability: mount("", text(4096))}, ""},
		"mount flags together": {&csi.NodeStageVolumeRequest{VolumeCapability: mount("", text(4096), "x")}, "volume_capability.mount.mount_flags has 4097 bytes; the limit is 4096"},

		"path of 4095 bytes":   {&csi.NodeStageVolumeRequest{StagingTargetPath: text(4095)}, ""},
		"path of 4096 bytes":   {&csi.NodePublishVolumeRequest{TargetPath: text(4096)}, "target_path has 4096 bytes; the limit is 4095"},
		"node ID of 256 bytes": {&csi.ControllerPublishVolumeRequest{NodeId: text(256)}, ""},
		"node ID of 257 bytes": {&csi.ControllerPublishVolumeRequest{NodeId: text(257)}, "node_id has 257 bytes; the limit is 256"},

		"volume ID is for the services": {&csi.DeleteVolumeRequest{VolumeId: text(1 << 16)}, ""},
		"snapshot ID likewise":          {&csi.DeleteSnapshotRequest{SnapshotId: text(1 << 16)}, ""},
		"source ID likewise":            {&csi.ListSnapshotsRequest{SourceVolumeId: text(1 << 16)}, ""},
		"source IDs likewise":           {&csi.CreateVolumeGroupSnapshotRequest{SourceVolumeIds: []string{text(1 << 16)}}, ""},
		"content source likewise": {&csi.CreateVolumeRequest{VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: text(1 << 16)}}}}, ""},
		"token likewise": {&csi.ListVolumesRequest{StartingToken: text(1 << 16)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkLimits(test.request)
			switch {
			case err == nil && test.want != "":
				t.Errorf("accepted, want %q", test.want)
			case err != nil && err.Error() != test.want:
				t.Errorf("got %q, want %q", err, test.want)
			case err != nil && !errors.Is(err, pool.ErrInvalid):
				t.Errorf("%q is not invalid", err)
			}
		})
	}
}
