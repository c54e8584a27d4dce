package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/orlop-csi/orlop/pkg/driver"
)

const standaloneLong = `Serves every CSI service for the pools of this machine on one unix socket. It
needs root: it attaches loop devices, and formats and mounts filesystems.

The configuration file says what the pools are made of:

  pools:
  - name: default
    source:                 # exactly one of:
      file: {path: /var/lib/orlop/default.img, size: 20Gi}
      # directory: /srv/volumes
      # device: /dev/disk/by-id/nvme-...
    reserve: 5%             # kept free: percent, or a size such as 10Gi
    overcommit: 1.0         # bytes promised per byte of the pool, at least 1

  file       makes one image file with an XFS filesystem in it, on any host
             filesystem: instant snapshots and clones everywhere. Its blocks are
             allocated at once; sparse: true leaves that to later.
  directory  uses a directory as it is. Snapshots and clones are instant if its
             filesystem can share blocks (XFS, btrfs), else they are copies.
  device     formats a whole disk or partition, if it is blank; else it refuses.

The driver can be stopped, killed and started again at any time: volumes in use
stay in use. On SIGTERM or SIGINT it refuses new calls and lets those in flight
finish; a second signal ends it at once.

It exits with 0 after a signal, with 1 if it could not start or had to cut calls
off at its end, and with 2 if the command line makes no sense.`

const standaloneExample = `  mkdir -p /etc/orlop /run/orlop
  cat > /etc/orlop/config.yaml <<END
  pools:
  - name: default
    source:
      file: {path: /var/lib/orlop/default.img, size: 20Gi}
  END
  csi-driver standalone --config /etc/orlop/config.yaml --metrics-address 127.0.0.1:9809

  # in another shell
  curl http://127.0.0.1:9809/healthz
  curl -s http://127.0.0.1:9809/metrics | grep ^orlop_pool`

func newStandalone() *cobra.Command {
	var (
		o driver.Options
		l logging
	)
	c := &cobra.Command{
		Use:     "standalone --config FILE",
		Short:   "Serve every CSI service for this machine on one socket",
		Long:    standaloneLong,
		Example: standaloneExample,
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return serveNode(c.Context(), o, l) },
	}
	nodeFlags(c, &o)
	processFlags(c, &o.MetricsAddress, &o.ShutdownTimeout, &l)
	return c
}

// serveNode runs a driver for the pools of this machine.
func serveNode(ctx context.Context, o driver.Options, l logging) error {
	if o.NodeID == "" {
		host, err := os.Hostname()
		if err != nil {
			return asFailure(fmt.Errorf("--node-id: %w", err))
		}
		o.NodeID = host
	}
	o.Version = buildOf().Version
	if err := o.Validate(); err != nil {
		return err
	}
	if err := l.begin(); err != nil {
		return err
	}
	return asFailure(driver.Standalone(ctx, o))
}

// nodeFlags are the flags of a driver that has pools.
func nodeFlags(c *cobra.Command, o *driver.Options) {
	f := c.Flags()
	f.SortFlags = false
	f.StringVar(&o.ConfigFile, "config", "",
		"`file` in YAML that names the pools; required. Example: /etc/orlop/config.yaml")
	endpointFlag(c, &o.Endpoint)
	f.StringVar(&o.NodeID, "node-id", "",
		"`name` of this machine, unique in the cluster: in Kubernetes, the name of the node. It becomes part of the IDs of new volumes; older ones keep theirs (default: the host's name)")
	f.StringVar(&o.StateDir, "state-dir", "/var/lib/orlop",
		"`directory` where the driver mounts its pools and notes which it has had. It holds no volume's data. It is made if its parent is there")
	mustComplete(c.MarkFlagFilename("config", "yaml", "yml"))
	mustComplete(c.MarkFlagDirname("state-dir"))
}
