package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

func endpointFlag(c *cobra.Command, endpoint *string) {
	c.Flags().StringVar(endpoint, "endpoint", "unix:///run/orlop/csi.sock",
		"`address` of the unix socket for CSI calls. Its directory must be there; a socket that a dead driver left is replaced, one that is served is refused")
}

// tlsFlag is the flag of the credentials for the connection between router and
// nodes.
func tlsFlag(c *cobra.Command, dir *string, who string) {
	c.Flags().StringVar(dir, "tls-dir", "",
		"`directory` with tls.crt, tls.key and ca.crt, in PEM; required, unless there is --kubernetes. The certificate has the URI "+who+" as a subject alternative name, and both TLS usages. The files are read anew when they change")
	mustComplete(c.MarkFlagDirname("tls-dir"))
}

// clusterFlags are the flags of a driver that Kubernetes runs.
func clusterFlags(c *cobra.Command, kubernetes *bool, kubeconfig *string, usage string) {
	c.Flags().BoolVar(kubernetes, "kubernetes", false, usage)
	c.Flags().StringVar(kubeconfig, "kubeconfig", "",
		"`file` that tells how to reach the API server, for --kubernetes outside a pod (default: the pod's service account)")
	mustComplete(c.MarkFlagFilename("kubeconfig"))
}

// processFlags are the flags of every command that serves.
func processFlags(c *cobra.Command, metricsAddress *string, shutdownTimeout *time.Duration, l *logging) {
	f := c.Flags()
	f.StringVar(metricsAddress, "metrics-address", "",
		"`host:port` that serves Prometheus metrics at /metrics, at /healthz whether the driver is well, and at /readyz whether all that it waits for is there. It has no access control. Without it, neither is served. Example: 127.0.0.1:9809")
	f.DurationVar(shutdownTimeout, "shutdown-timeout", 30*time.Second,
		"`time` that calls in flight have for finishing after SIGTERM before they are cut off; the orchestrator can repeat those. Example: 2m")
	f.StringVar(&l.format, "log-format", "text",
		"`format` of the log on standard error: text, or json with one object in each line")
	f.Uint8VarP(&l.verbosity, "v", "v", 0,
		"`level` of detail of the log. 0: one line for each call that changes something or fails. 4: also those that orchestrators repeat all day. 5: also requests in full, without secrets")
	mustComplete(c.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp)))
}

// mustComplete is for what fails only if a flag's name is misspelt.
func mustComplete(err error) {
	if err != nil {
		panic(err)
	}
}

// logging is what the flags say of the log.
type logging struct {
	format    string
	verbosity uint8
}

// begin sets the log up, on standard error.
func (l logging) begin() error {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	if err := flags.Set("v", strconv.Itoa(int(l.verbosity))); err != nil {
		return err
	}
	switch l.format {
	case "text":
	case "json":
		// klog's verbosity n is slog's level -n.
		level := slog.Level(-int(l.verbosity))
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	default:
		return fmt.Errorf("--log-format: %q is neither text nor json", l.format)
	}
	return nil
}
