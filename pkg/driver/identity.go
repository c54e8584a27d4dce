package driver

import (
	"context"
	"sync/atomic"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// pluginServices is what the driver can do as a whole.
var pluginServices = []csi.PluginCapability_Service_Type{
	csi.PluginCapability_Service_CONTROLLER_SERVICE,
	csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE,
	csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
	csi.PluginCapability_Service_SNAPSHOT_ACCESSIBILITY_CONSTRAINTS,
	csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
}

// pluginExpansion is how volumes can grow.
var pluginExpansion = []csi.PluginCapability_VolumeExpansion_Type{
	csi.PluginCapability_VolumeExpansion_ONLINE,
}

// identity is the CSI Identity service.
type identity struct {
	csi.UnimplementedIdentityServer
	version string
	ready   *readiness
}

// GetPluginInfo implements csi.IdentityServer.
func (s *identity) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: Name, VendorVersion: s.version}, nil
}

// GetPluginCapabilities implements csi.IdentityServer.
func (s *identity) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	r := &csi.GetPluginCapabilitiesResponse{}
	for _, t := range pluginServices {
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{
			Service: &csi.PluginCapability_Service{Type: t},
		}})
	}
	for _, t := range pluginExpansion {
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_VolumeExpansion_{
			VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: t},
		}})
	}
	return r, nil
}

// Probe implements csi.IdentityServer. It is never an error: that would have the
// orchestrator restart the driver, which repairs no disk and takes the other
// pools away for a while. A pool that fails tells so in the health calls and in
// the metrics.
func (s *identity) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(s.ready.reason() == "")}, nil
}

// readiness is whether the driver serves. The zero value says that it is
// starting.
type readiness struct{ why atomic.Pointer[string] }

// set notes the reason why the driver does not serve; none is that it does.
func (r *readiness) set(reason string) { r.why.Store(&reason) }

// reason tells why the driver does not serve; none is that it does.
func (r *readiness) reason() string {
	if why := r.why.Load(); why != nil {
		return *why
	}
	return "starting"
}
