// Command csi-driver is Orlop's CSI driver. This package is flags and help, and
// picks what to run; package driver runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

// The exit codes beside 0.
const (
	exitFailure = 1 // it did not start, or calls were cut off at its end
	exitUsage   = 2 // the command line makes no sense
)

// failure is an error that is not one of usage.
type failure struct{ error }

// asFailure marks an error, if there is one, as not one of usage.
func asFailure(err error) error {
	if err == nil {
		return nil
	}
	return failure{err}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	klog.Flush()
	os.Exit(code)
}

// execute runs a command line and gives the exit code. What is wrong it tells
// in one line.
func execute(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := newRoot() //nolint:contextcheck // cobra hands the context on
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	message := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	if errors.As(err, &failure{}) {
		fmt.Fprintf(errOut, "csi-driver: %s\n", message)
		return exitFailure
	}
	fmt.Fprintf(errOut, "csi-driver: %s (see %s --help)\n", message, command.CommandPath())
	return exitUsage
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "csi-driver",
		Short: "Orlop, a CSI driver for the disks of one machine",
		Long: `Orlop gives Kubernetes nodes, and single machines, volumes from their own
disks: with an enforced size, online growth, snapshots and clones. It needs
nothing on the host but a Linux kernel and the tools that make filesystems.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("a command must be given, such as standalone")
		},
		SilenceUsage:       true,
		SilenceErrors:      true,
		DisableSuggestions: true, // they take a second line
	}
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "FlagUsages", "FlagUsagesWrapped 100"))
	root.AddCommand(newStandalone(), newNode(), newController(), newOrphans(), newVersion(), newReference(root))
	return root
}
