package driver

import (
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func TestIdentityTellsWhatTheDriverIs(t *testing.T) {
	captureLog(t, "text", 0)
	client := csi.NewIdentityClient(serve(t, &fakeServices{}, time.Second).conn)
	info, err := client.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetName() != "csi.orlop.dev" || info.GetVendorVersion() != "v1.2.3" {
		t.Errorf("got %v", info)
	}

	capabilities, err := client.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, c := range capabilities.GetCapabilities() {
		switch {
		case c.GetService() != nil:
			got[c.GetService().GetType().String()] = true
		case c.GetVolumeExpansion() != nil:
			got["expansion "+c.GetVolumeExpansion().GetType().String()] = true
		}
	}
	want := []string{"CONTROLLER_SERVICE", "GROUP_CONTROLLER_SERVICE", "VOLUME_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_METADATA_SERVICE", "expansion ONLINE"}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, w := range want {
		if !got[w] {
			t.Errorf("lacks %s", w)
		}
	}
}

func TestProbeIsReadyOnlyWhileTheDriverServes(t *testing.T) {
	ready := &readiness{}
	service := &identity{ready: ready}
	for _, step := range []struct {
		do   func()
		want bool
	}{
		{func() {}, false},
		{func() { ready.set("opening pools") }, false},
		{func() { ready.set("") }, true},
		{func() { ready.set("shutting down") }, false},
	} {
		step.do()
		r, err := service.Probe(t.Context(), &csi.ProbeRequest{})
		if err != nil || r.GetReady().GetValue() != step.want {
			t.Errorf("%q: got %v (error %v), want %v", ready.reason(), r, err, step.want)
		}
	}
}
