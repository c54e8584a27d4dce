package driver

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Options is what a driver process is told by its flags.
type Options struct {
	// Version is what the driver calls itself.
	Version string
	// Endpoint is where the CSI calls come in: unix:///run/orlop/csi.sock.
	Endpoint string
	// NodeID is the node's name; see pool.NodeSegment.
	NodeID string
	// ConfigFile is the file that names the pools; see package config.
	ConfigFile string
	// StateDir is where the driver mounts its pools and notes which it has
	// had. It is made if its parent is there.
	StateDir string
	// MetricsAddress is the TCP address of /metrics and /healthz; none is that
	// they are not served.
	MetricsAddress string
	// ShutdownTimeout is how long calls in flight may take at the end.
	ShutdownTimeout time.Duration
	// PeerAddress is the TCP address at which the router calls this node; none
	// is that there is no router.
	PeerAddress string
	// CopyBandwidth bounds what copies from other nodes take together, in
	// bytes per second; 0 is no bound.
	CopyBandwidth int64
	// CopyAbandon is how long a copy goes on, and what it has brought is kept,
	// while nobody asks for its volume.
	CopyAbandon time.Duration
	// TLSDir has the credentials for that; see package peer.
	TLSDir string
	// Kubernetes is that they come from the router instead, by way of the API
	// server; see package cluster. NodeID must be the name of the Node object.
	Kubernetes bool
	// Kubeconfig is the file that tells how to reach the API server; none is
	// that the process runs in a pod.
	Kubeconfig string
	// KubeletRegistration is the directory in which the kubelet looks for
	// plugins; none is that there is no kubelet.
	KubeletRegistration string
}

// Validate checks what the flags alone can tell. The error names the flag.
func (o Options) Validate() error {
	if err := validateProcess(o.Endpoint, o.MetricsAddress, o.ShutdownTimeout); err != nil {
		return err
	}
	if _, err := pool.NodeSegment(o.NodeID); err != nil {
		return fmt.Errorf("--node-id: %w", err)
	}
	if len(o.NodeID) > maxNodeID {
		return fmt.Errorf("--node-id: %d bytes are more than the %d that CSI allows", len(o.NodeID), maxNodeID)
	}
	if o.ConfigFile == "" {
		return errors.New("--config: must name the configuration file")
	}
	if !filepath.IsAbs(o.StateDir) {
		return fmt.Errorf("--state-dir: %q is not an absolute path", o.StateDir)
	}
	if o.CopyBandwidth < 0 {
		return fmt.Errorf("--copy-bandwidth: %d is negative", o.CopyBandwidth)
	}
	if o.CopyAbandon < 0 {
		return fmt.Errorf("--copy-abandon-after: %s is negative", o.CopyAbandon)
	}
	if o.PeerAddress != "" {
		if _, _, err := net.SplitHostPort(o.PeerAddress); err != nil {
			return fmt.Errorf("--peer-address: %w; give host:port", err)
		}
		if err := validateTrust(o.TLSDir, o.Kubernetes, o.Kubeconfig); err != nil {
			return err
		}
	}
	if o.KubeletRegistration != "" && !filepath.IsAbs(o.KubeletRegistration) {
		return fmt.Errorf("--kubelet-registration-dir: %q is not an absolute path", o.KubeletRegistration)
	}
	return nil
}

// validateTrust checks where the credentials come from.
func validateTrust(tlsDir string, kubernetes bool, kubeconfig string) error {
	switch {
	case tlsDir == "" && !kubernetes:
		return errors.New("--tls-dir: must name the directory of the credentials; or give --kubernetes, and they come by themselves")
	case tlsDir != "" && kubernetes:
		return errors.New("--tls-dir and --kubernetes: give one of them")
	case kubeconfig != "" && !kubernetes:
		return errors.New("--kubeconfig: is of use only with --kubernetes")
	}
	return nil
}

// RouterOptions is what a router process is told by its flags.
type RouterOptions struct {
	// Version, Endpoint, MetricsAddress and ShutdownTimeout are as in Options.
	Version         string
	Endpoint        string
	MetricsAddress  string
	ShutdownTimeout time.Duration
	// TLSDir has the router's credentials; see package peer.
	TLSDir string
	// Nodes is the nodes, by name, and their peer addresses.
	Nodes map[string]string
	// Kubernetes is that nodes and credentials come from the API server
	// instead, and Kubeconfig is as in Options.
	Kubernetes bool
	Kubeconfig string
	// Namespace is that of the driver in the cluster; none is that of the pod.
	Namespace string
	// NodeService is the headless Service of the nodes' drivers, and
	// NodeAccount the service account that they run with.
	NodeService, NodeAccount string
	// CASecret is the Secret in which the routers keep their authority.
	CASecret string
	// ClaimsFile lists what is claimed of the nodes' volumes and snapshots,
	// where there is no Kubernetes to tell; see router.FileClaims.
	ClaimsFile string
	// OrphanGracePeriod is how long something is unclaimed before it is an
	// orphan.
	OrphanGracePeriod time.Duration
}

// Validate checks what the flags alone can tell. The error names the flag.
func (o RouterOptions) Validate() error {
	if err := validateProcess(o.Endpoint, o.MetricsAddress, o.ShutdownTimeout); err != nil {
		return err
	}
	if err := validateTrust(o.TLSDir, o.Kubernetes, o.Kubeconfig); err != nil {
		return err
	}
	if o.OrphanGracePeriod <= 0 {
		return fmt.Errorf("--orphan-grace-period: %s is no time", o.OrphanGracePeriod)
	}
	if o.Kubernetes {
		return o.validateKubernetes()
	}
	if len(o.Nodes) == 0 {
		return errors.New("--node: must name at least one node, as name=host:port; or give --kubernetes, and they are found")
	}
	for name, address := range o.Nodes {
		if _, err := pool.NodeSegment(name); err != nil {
			return fmt.Errorf("--node: %w", err)
		}
		if _, _, err := net.SplitHostPort(address); err != nil {
			return fmt.Errorf("--node %s: %w; give name=host:port", name, err)
		}
	}
	return nil
}

func (o RouterOptions) validateKubernetes() error {
	if len(o.Nodes) > 0 {
		return errors.New("--node and --kubernetes: give one of them")
	}
	if o.ClaimsFile != "" {
		return errors.New("--claims-file and --kubernetes: give one of them")
	}
	for flag, value := range map[string]string{
		"--node-service": o.NodeService, "--node-service-account": o.NodeAccount, "--ca-secret": o.CASecret,
	} {
		if value == "" {
			return fmt.Errorf("%s: must have a name", flag)
		}
	}
	return nil
}

func validateProcess(endpoint, metricsAddress string, shutdownTimeout time.Duration) error {
	if _, err := socketPath(endpoint); err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	if metricsAddress != "" {
		if _, _, err := net.SplitHostPort(metricsAddress); err != nil {
			return fmt.Errorf("--metrics-address: %w; give host:port, or nothing to turn it off", err)
		}
	}
	if shutdownTimeout < 0 {
		return fmt.Errorf("--shutdown-timeout: %s is negative", shutdownTimeout)
	}
	return nil
}
