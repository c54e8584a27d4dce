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
}

// Validate checks what the flags alone can tell. The error names the flag.
func (o Options) Validate() error {
	if _, err := socketPath(o.Endpoint); err != nil {
		return fmt.Errorf("--endpoint: %w", err)
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
	if o.MetricsAddress != "" {
		if _, _, err := net.SplitHostPort(o.MetricsAddress); err != nil {
			return fmt.Errorf("--metrics-address: %w; give host:port, or nothing to turn it off", err)
		}
	}
	if o.ShutdownTimeout < 0 {
		return fmt.Errorf("--shutdown-timeout: %s is negative", o.ShutdownTimeout)
	}
	return nil
}
