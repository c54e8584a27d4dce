// Command backup keeps a copy of a volume in a file, and brings it up to date by
// reading only what changed since the last time. It is an example of what a
// backup tool does with CSI snapshots and the SnapshotMetadata service; it knows
// nothing of the driver but what the CSI specification says.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "backup:", err)
		os.Exit(1) //nolint:gocritic // the signals end with the process
	}
}

func newCommand() *cobra.Command {
	var controller, node string
	root := &cobra.Command{
		Use:   "backup",
		Short: "Keep an incremental copy of a CSI volume in a file",
		Long: `Keep a copy of a volume in a file, reading only what changed since the last time.

  save     cuts a snapshot of the volume, which may be in use; asks the driver
           what is allocated in it (the first time) or what changed since the
           snapshot of the last time; and copies that, and no more, to the file.
           The snapshot is kept, to tell the changes by next time. The one of the
           last time is deleted.
  restore  makes a volume of the file, and reads it back to see that it is equal.

The file is sparse and as large as the volume: an image that can be mounted, or
compared, with ordinary tools. Beside it, FILE.json remembers the snapshot that
it is equal to. A save that was interrupted, at whatever instant, is finished by
the next; until then the file is neither the old copy nor the new. Keep two
copies in turn, or copies on a filesystem with snapshots of its own, if one must
be whole at any time.

It runs as root on the node that has the volume, because it reads the snapshot
as a block device there.`,
		Example: `  backup save --volume node-1/bq3xk7a2md/data --to /backup/data.img
  backup restore --from /backup/data.img --name data-restored --filesystem ext4
  mount -o ro,loop /backup/data.img /mnt`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&controller, "endpoint", "unix:///run/orlop/csi.sock", "socket of the driver's Controller and SnapshotMetadata services")
	root.PersistentFlags().StringVar(&node, "node-endpoint", "", "socket of its Node service; the same if empty")
	connected := func(run func(ctx context.Context, d *driver) (string, error)) func(*cobra.Command, []string) error {
		return func(c *cobra.Command, _ []string) error {
			d, err := connect(controller, node)
			if err != nil {
				return err
			}
			defer d.close()
			report, err := run(c.Context(), d)
			if err == nil {
				fmt.Fprintln(c.OutOrStdout(), report)
			}
			return err
		}
	}

	var volume, to string
	var verify bool
	save := &cobra.Command{
		Use:   "save --volume ID --to FILE",
		Short: "Make the file equal to the volume as it is now",
		Args:  cobra.NoArgs,
		RunE: connected(func(ctx context.Context, d *driver) (string, error) {
			r, err := save(ctx, d, volume, to, verify)
			return r.String(), err
		}),
	}
	save.Flags().StringVar(&volume, "volume", "", "ID of the volume, as CreateVolume gave it (in Kubernetes: spec.csi.volumeHandle of the PersistentVolume)")
	save.Flags().StringVar(&to, "to", "", "file that holds the copy; made if it is not there")
	save.Flags().BoolVar(&verify, "verify", false, "then read all of the snapshot and of the file, and compare them")

	var from, name, filesystem string
	restore := &cobra.Command{
		Use:   "restore --from FILE --name NAME",
		Short: "Make a volume that is equal to the file",
		Args:  cobra.NoArgs,
		RunE: connected(func(ctx context.Context, d *driver) (string, error) {
			return restore(ctx, d, from, name, filesystem)
		}),
	}
	restore.Flags().StringVar(&from, "from", "", "file that holds the copy")
	restore.Flags().StringVar(&name, "name", "", "name of the new volume")
	restore.Flags().StringVar(&filesystem, "filesystem", "", "filesystem that is in the copy, as ext4; empty makes a block volume")
	for _, required := range []struct {
		command *cobra.Command
		flags   []string
	}{{save, []string{"volume", "to"}}, {restore, []string{"from", "name"}}} {
		for _, flag := range required.flags {
			if err := required.command.MarkFlagRequired(flag); err != nil {
				panic(err) // there is no such flag
			}
		}
		root.AddCommand(required.command)
	}
	return root
}
