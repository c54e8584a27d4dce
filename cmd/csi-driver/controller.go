package main

import (
	"github.com/spf13/cobra"

	"github.com/orlop-csi/orlop/pkg/driver"
)

const controllerLong = `Serves the CSI Identity and Controller services for a fleet of nodes on one unix
socket, by forwarding each call to the node that it concerns: the one that has
the volume; for a new volume the one that the request names, or else the one
with most room. It keeps nothing itself, so that any number of them can run.

A node that does not answer may hold volumes: calls that concern it are
UNAVAILABLE and can be repeated. One that is no longer given with --node is gone
for good, and its volumes with it: to delete them succeeds.`

const controllerExample = `  csi-driver controller --tls-dir /etc/orlop/tls \
    --node node-1=192.0.2.1:9810 --node node-2=192.0.2.2:9810`

func newController() *cobra.Command {
	var (
		o driver.RouterOptions
		l logging
	)
	c := &cobra.Command{
		Use:     "controller --node NAME=HOST:PORT... --tls-dir DIRECTORY",
		Short:   "Serve a fleet of nodes as one CSI controller",
		Long:    controllerLong,
		Example: controllerExample,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Version = buildOf().Version
			if err := o.Validate(); err != nil {
				return err
			}
			if err := l.begin(); err != nil {
				return err
			}
			return asFailure(driver.Router(c.Context(), o))
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.StringToStringVar(&o.Nodes, "node", nil,
		"`name=host:port` of a node's driver: its --node-id and its --peer-address; once for each node, required")
	endpointFlag(c, &o.Endpoint)
	tlsFlag(c, &o.TLSDir, "orlop://controller")
	processFlags(c, &o.MetricsAddress, &o.ShutdownTimeout, &l)
	return c
}
