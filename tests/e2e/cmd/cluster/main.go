// Command cluster starts and stops a Kubernetes cluster on this machine, with
// Orlop on it. See its help.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/orlop-csi/orlop/tests/e2e/cluster"
	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	if err := root().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cluster",
		Short: "A real Kubernetes on this machine, with Orlop on it",
		Long: `A real Kubernetes on this machine, with Orlop on it: etcd, API server, controller
manager and scheduler, three nodes with containerd, kubelet and kube-proxy, each
in namespaces of its own, and the snapshot controller. It takes root.

Everything is built from Go modules and Debian packages; no image registry is
needed. The first time takes a quarter of an hour on two processors; what was
built is kept in ~/.cache/orlop-e2e. All else is in ` + cluster.Dir + `.

  cd tests/e2e
  go run ./cmd/cluster up
  export KUBECONFIG=` + cluster.Kubeconfig + ` PATH=` + cluster.Dir + `/bin:$PATH
  kubectl get nodes
  go run ./cmd/cluster update     # after a change of the driver or the manifests
  go run ./cmd/cluster down`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	up := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster, and install Orlop from this checkout",
		Args:  cobra.NoArgs,
	}
	bare := up.Flags().Bool("bare", false, "without Orlop")
	up.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cluster.Up(cmd.Context(), ".", *bare, os.Stderr); err != nil {
			return err
		}
		fmt.Printf("\nThe cluster is ready. To use it:\n\n  export KUBECONFIG=%s PATH=%s/bin:$PATH\n", cluster.Kubeconfig, cluster.Dir)
		return nil
	}
	status := &cobra.Command{
		Use:   "status",
		Short: "Tell what runs",
		Args:  cobra.NoArgs,
	}
	quiet := status.Flags().Bool("quiet", false, "only fail, if no cluster is running")
	status.RunE = func(cmd *cobra.Command, _ []string) error {
		if *quiet {
			_, err := cluster.Open(".")
			return err
		}
		text, err := cluster.Status(cmd.Context())
		fmt.Print(text)
		return err
	}
	root.AddCommand(
		up, status,
		&cobra.Command{
			Use:   "update",
			Short: "Build the driver of this checkout, load it into the nodes, apply its manifests",
			Args:  cobra.NoArgs,
			RunE:  func(cmd *cobra.Command, _ []string) error { return cluster.Update(cmd.Context(), ".", os.Stderr) },
		},
		&cobra.Command{
			Use:   "down",
			Short: "Stop the cluster, and remove all that it made",
			Args:  cobra.NoArgs,
			RunE:  func(cmd *cobra.Command, _ []string) error { return cluster.Down(cmd.Context(), os.Stderr) },
		},
	)
	return root
}
