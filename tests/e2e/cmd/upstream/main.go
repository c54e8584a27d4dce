// Command upstream runs Kubernetes' test suite for external storage drivers
// against Orlop, on the cluster of this machine. See scripts/e2e.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/orlop-csi/orlop/tests/e2e/build"
	"github.com/orlop-csi/orlop/tests/e2e/cluster"
	"github.com/orlop-csi/orlop/tests/e2e/upstream"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	focus := flag.String("focus", "", "`regexp` of the names of the specs to run; all if empty")
	procs := flag.Int("procs", 4, "`number` of specs that run at once")
	artifacts := flag.String("artifacts", "_artifacts/upstream", "`directory` for reports and logs; it is emptied")
	flag.Parse()
	if err := run(ctx, *focus, *procs, *artifacts); err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, focus string, procs int, artifacts string) error {
	expression, err := regexp.Compile(focus)
	if err != nil {
		return fmt.Errorf("-focus: %w", err)
	}
	if artifacts, err = filepath.Abs(artifacts); err != nil {
		return err
	}
	c, err := cluster.Open(".")
	if err != nil {
		return err
	}
	b, err := build.New(".", os.Stderr)
	if err != nil {
		return err
	}
	programs, err := b.Upstream(ctx)
	if err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		if err := b.Step("loading the suite's images on "+n.Name, func() error {
			_, err := n.Exec(ctx, cluster.Dir+"/bin/ctr", "--namespace", "k8s.io", "images", "import", programs.Images)
			return err
		}); err != nil {
			return err
		}
	}
	return upstream.Run(ctx, b, programs, upstream.Options{
		Focus: expression, Procs: procs, Kubeconfig: cluster.Kubeconfig, Artifacts: artifacts, Log: os.Stderr,
	})
}
