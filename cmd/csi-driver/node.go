package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/orlop-csi/orlop/pkg/driver"
	"github.com/orlop-csi/orlop/pkg/transfer"
)

const nodeLong = `Serves every CSI service for the pools of this machine on one unix socket, as
standalone does, and the Controller service on a TCP port to the router (see
csi-driver controller). Router and node show each other certificates of one
authority, and each checks that the other is who it should be; there is no way
to turn that off.

A volume that is made of a snapshot or a volume of another node is copied from
there, over the same port: the router gives a ticket for one snapshot and a short
time. A copy that is cut off goes on where it was.

With --kubernetes, this node's key is made here and kept in the state directory,
and its certificate is asked for, and renewed in time, through the API server,
where the router signs it. Nothing else is needed of the API server: the kubelet
is served also while it cannot be reached.

With --kubelet-registration-dir the driver registers itself with the kubelet,
also after that restarted. /healthz tells if the kubelet refuses.`

const nodeExample = `  csi-driver node --config /etc/orlop/config.yaml --node-id node-1 \
    --peer-address :9810 --tls-dir /etc/orlop/tls

  # in a pod
  csi-driver node --config /etc/orlop/config.yaml --node-id "$NODE_NAME" --kubernetes \
    --endpoint unix:///var/lib/kubelet/plugins/csi.orlop.dev/csi.sock \
    --kubelet-registration-dir /var/lib/kubelet/plugins_registry --metrics-address :9811`

func newNode() *cobra.Command {
	var (
		o driver.Options
		l logging
	)
	c := &cobra.Command{
		Use:     "node --config FILE (--tls-dir DIRECTORY | --kubernetes)",
		Short:   "Serve this machine's pools to the machine and to the router",
		Long:    nodeLong,
		Example: nodeExample,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.PeerAddress == "" {
				return errors.New("--peer-address must be given; without a router, use csi-driver standalone")
			}
			return serveNode(c.Context(), o, l)
		},
	}
	nodeFlags(c, &o)
	c.Flags().StringVar(&o.PeerAddress, "peer-address", ":9810",
		"`host:port` at which the router, and nobody else, can call this node")
	c.Flags().Var(&bytesPerSecond{&o.CopyBandwidth}, "copy-bandwidth",
		"bound of what copies from other nodes to this one take together, in `bytes` per second, such as 200Mi; 0 is none")
	c.Flags().DurationVar(&o.CopyAbandon, "copy-abandon-after", transfer.DefaultAbandon,
		"`time` after which a copy from another node is dropped that nobody asks for any more, and a snapshot that was cut to be copied")
	tlsFlag(c, &o.TLSDir, "orlop://node/NAME")
	clusterFlags(c, &o.Kubernetes, &o.Kubeconfig,
		"get the certificate for the router from it, through the API server; --node-id is the name of the Node object")
	c.Flags().StringVar(&o.KubeletRegistration, "kubelet-registration-dir", "",
		"`directory` in which the kubelet looks for plugins; the driver then registers itself. The path of --endpoint must be the same for the kubelet. Example: /var/lib/kubelet/plugins_registry")
	mustComplete(c.MarkFlagDirname("kubelet-registration-dir"))
	processFlags(c, &o.MetricsAddress, &o.ShutdownTimeout, &l)
	return c
}
