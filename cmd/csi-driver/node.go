package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/orlop-csi/orlop/pkg/driver"
)

const nodeLong = `Serves every CSI service for the pools of this machine on one unix socket, as
standalone does, and the Controller service on a TCP port to the router (see
csi-driver controller). Router and node show each other certificates of one
authority, and each checks that the other is who it should be; there is no way
to turn that off.`

const nodeExample = `  csi-driver node --config /etc/orlop/config.yaml --node-id node-1 \
    --peer-address :9810 --tls-dir /etc/orlop/tls`

func newNode() *cobra.Command {
	var (
		o driver.Options
		l logging
	)
	c := &cobra.Command{
		Use:     "node --config FILE --tls-dir DIRECTORY",
		Short:   "Serve this machine's pools to the machine and to the router",
		Long:    nodeLong,
		Example: nodeExample,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.PeerAddress == "" || o.TLSDir == "" {
				return errors.New("--peer-address and --tls-dir must be given; without a router, use csi-driver standalone")
			}
			return serveNode(c.Context(), o, l)
		},
	}
	nodeFlags(c, &o)
	c.Flags().StringVar(&o.PeerAddress, "peer-address", ":9810",
		"`host:port` at which the router, and nobody else, can call this node")
	tlsFlag(c, &o.TLSDir, "orlop://node/NAME")
	processFlags(c, &o.MetricsAddress, &o.ShutdownTimeout, &l)
	return c
}
