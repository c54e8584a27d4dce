package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/router"
)

const orphansLong = `Lists the volumes and snapshots that nodes hold and that nothing claims: in
Kubernetes, no PersistentVolume and no VolumeSnapshotContent; else, no line of
the router's --claims-file. They come of nodes that were away when their volumes
were deleted, of provisioning that was given up, and of PersistentVolumes with
reclaim policy Retain that were deleted.

It asks a router that runs (csi-driver controller) over its socket. What has been
unclaimed for the router's --orphan-grace-period is an orphan. Each router
measures that for itself, from its own start on.

Nothing is removed unless --remove says so: exactly what is named, or with --all
and --yes all orphans. Before each removal the router asks again whether it is
still unclaimed, and the node refuses what is in use. What is removed is gone.`

const orphansExample = `  kubectl --namespace orlop-system exec deploy/orlop-controller --container csi-driver -- \
    csi-driver orphans
  csi-driver orphans --remove volume/node-1/bq3xk7a2md/pvc-0b7c
  csi-driver orphans --remove --all --yes`

func newOrphans() *cobra.Command {
	var (
		endpoint, output string
		timeout          time.Duration
		remove, all, yes bool
	)
	c := &cobra.Command{
		Use:     "orphans [--remove KIND/ID...]",
		Short:   "List what nodes hold and nothing claims, and remove it",
		Long:    orphansLong,
		Example: orphansExample,
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case output != "table" && output != "json":
				return fmt.Errorf("--output: %q is neither table nor json", output)
			case !remove && (all || yes || len(args) > 0):
				return errors.New("what is named, --all and --yes are for --remove")
			case remove && !all && len(args) == 0:
				return errors.New("--remove: name what to remove, as volume/ID or snapshot/ID, or give --all")
			case all && len(args) > 0:
				return errors.New("--remove: name what to remove or give --all, not both")
			case all && !yes:
				return errors.New("--remove --all removes every orphan, and what is removed is gone: confirm it with --yes")
			}
			var named []orphan
			for _, arg := range args {
				o, err := parseOrphan(arg)
				if err != nil {
					return err
				}
				named = append(named, o)
			}
			connection, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return fmt.Errorf("--endpoint: %w", err)
			}
			defer connection.Close()
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			client := router.OrphansClient{Connection: connection}
			report, err := client.List(ctx)
			if err != nil {
				return asFailure(plainly(err))
			}
			if !remove {
				return asFailure(listOrphans(c.OutOrStdout(), c.ErrOrStderr(), report, output))
			}
			if all {
				for _, u := range report.Unclaimed {
					if u.Orphan {
						named = append(named, orphan{u.Kind, u.ID})
					}
				}
			}
			return asFailure(removeOrphans(ctx, c.OutOrStdout(), client, named))
		},
	}
	f := c.Flags()
	f.SortFlags = false
	f.StringVar(&endpoint, "endpoint", "unix:///run/orlop/csi.sock",
		"`address` of the unix socket of the router, as given to csi-driver controller")
	f.StringVarP(&output, "output", "o", "table", "`format` of the list: table, or json for programs")
	f.BoolVar(&remove, "remove", false, "remove what is named, or with --all every orphan, instead of listing")
	f.BoolVar(&all, "all", false, "with --remove: every orphan whose grace period is over")
	f.BoolVar(&yes, "yes", false, "with --remove --all: confirm that all of them shall be removed")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "`time` that the router and the nodes may take for all of it")
	mustComplete(c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)))
	return c
}

// orphan names something that a node holds, as kind/ID on the command line.
type orphan struct {
	kind router.Kind
	id   string
}

func (o orphan) String() string { return string(o.kind) + "/" + o.id }

func parseOrphan(s string) (orphan, error) {
	kind, id, _ := strings.Cut(s, "/")
	o := orphan{router.Kind(kind), id}
	if o.kind != router.KindVolume && o.kind != router.KindSnapshot || id == "" {
		return o, fmt.Errorf("%q is neither volume/ID nor snapshot/ID", s)
	}
	return o, nil
}

func listOrphans(out, errOut io.Writer, report router.Report, output string) error {
	if output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(report)
	}
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "NAME\tNODE\tMIB\tUNCLAIMED FOR\tSTATE")
	for _, u := range report.Unclaimed {
		state := "orphan"
		if !u.Orphan {
			state = "in its grace period"
		}
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\t%s\n", orphan{u.Kind, u.ID}, u.Node, u.Bytes>>20, time.Since(u.Since).Round(time.Second), state)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, problem := range report.Unanswered {
		fmt.Fprintf(errOut, "not looked at: %s\n", problem)
	}
	return nil
}

// removeOrphans removes one after the other, and goes on after one that cannot
// be removed.
func removeOrphans(ctx context.Context, out io.Writer, client router.OrphansClient, named []orphan) error {
	var errs []error
	for _, o := range named {
		if err := client.Remove(ctx, o.kind, o.id); err != nil {
			errs = append(errs, fmt.Errorf("%s is left: %w", o, plainly(err)))
			continue
		}
		fmt.Fprintln(out, "removed", o)
	}
	return errors.Join(errs...)
}

// plainly gives the message of a status without what gRPC puts around it.
func plainly(err error) error { return errors.New(status.Convert(err).Message()) }
