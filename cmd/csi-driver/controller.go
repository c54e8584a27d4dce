package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/orlop-csi/orlop/pkg/driver"
)

const controllerLong = `Serves the CSI Identity and Controller services for a fleet of nodes on one unix
socket, by forwarding each call to the node that it concerns: the one that has
the volume; for a new volume the one that the request names, or else the one
with most room. It keeps nothing itself, so that any number of them can run.

A node that does not answer may hold volumes: calls that concern it are
UNAVAILABLE and can be repeated. One that is no longer given with --node is gone
for good, and its volumes with it: to delete them succeeds.

With --kubernetes the nodes are found by the headless Service of their drivers,
and are gone for good when their Node object is deleted. The authority for the
certificates of router and nodes is made and kept in a Secret, and is replaced
before it ends. The router is the signer of orlop.dev/peer: it signs what a node
requests for itself with the service account of the node drivers, and refuses
everything else. It takes the taint csi.orlop.dev/not-ready off a node once the
driver serves there.

What a node holds and nothing claims is reported as an orphan, in the log and in
the metrics, and never removed without being told to: see csi-driver orphans.`

const controllerExample = `  csi-driver controller --tls-dir /etc/orlop/tls \
    --node node-1=192.0.2.1:9810 --node node-2=192.0.2.2:9810

  # in a pod
  csi-driver controller --kubernetes --metrics-address :9812`

func newController() *cobra.Command {
	var (
		o driver.RouterOptions
		l logging
	)
	c := &cobra.Command{
		Use:     "controller (--node NAME=HOST:PORT... --tls-dir DIRECTORY | --kubernetes)",
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
		"`name=host:port` of a node's driver: its --node-id and its --peer-address; once for each node; required, unless there is --kubernetes")
	endpointFlag(c, &o.Endpoint)
	tlsFlag(c, &o.TLSDir, "orlop://controller")
	clusterFlags(c, &o.Kubernetes, &o.Kubeconfig,
		"find the nodes through the API server, and keep the authority for certificates there")
	f.StringVar(&o.Namespace, "namespace", "",
		"`name` of the namespace of the driver's Service, service accounts and Secret (default: that of the pod)")
	f.StringVar(&o.NodeService, "node-service", "orlop-node",
		"`name` of the headless Service whose endpoints are the drivers of the nodes, with a port of the name peer")
	f.StringVar(&o.NodeAccount, "node-service-account", "orlop-node",
		"`name` of the service account of the node drivers, the only one to which certificates are issued")
	f.StringVar(&o.CASecret, "ca-secret", "orlop-ca",
		"`name` of the Secret in which the authority for certificates is kept; it is made if it is not there")
	f.StringVar(&o.ClaimsFile, "claims-file", "",
		"`file` that lists the IDs of the volumes and snapshots that are wanted, one a line, where there is no Kubernetes to tell. It is read anew each time; replace it by renaming. Without it, orphans cannot be told")
	f.DurationVar(&o.OrphanGracePeriod, "orphan-grace-period", time.Hour,
		"`time` for which nothing must have claimed a volume or snapshot before it is reported as an orphan")
	mustComplete(c.MarkFlagFilename("claims-file"))
	processFlags(c, &o.MetricsAddress, &o.ShutdownTimeout, &l)
	return c
}
