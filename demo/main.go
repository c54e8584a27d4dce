// Command demo shows what the driver is for, in one run: it starts csi-driver on
// a temporary pool and is its client, as an orchestrator would be. Volumes are
// made, used, cut, copied, grown and deleted with real data in them, and
// everything that comes back is compared with what was written.
//
// It knows the driver by its command line and its socket alone. It changes
// nothing outside the temporary directory that it makes, but for the mounts and
// loop devices of what is in there, and undoes all of it at the end, also after
// a failure or a signal.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The exit codes beside 0.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitInterrupted = 130 // as a shell reports SIGINT
)

const help = `Shows the driver at work on this machine: one command, no Kubernetes.

It starts "csi-driver standalone" on a pool in a temporary sparse file and calls
it over its CSI socket. It makes a filesystem volume and a block volume, fills
them with checksummed data, snapshots the first while a program writes to it,
grows both while they are in use, clones, restores, verifies every checksum,
kills the driver under load, and deletes everything. For each step it tells how
long it took and what it cost on disk.

It needs root, for loop devices and mounts, and the tools of XFS and ext4 (make
installs them). Nothing is left behind, also after a failure or Ctrl-C.

Usage:
  demo [flags]

Examples:
  make demo                                      # builds the driver first
  go run ./demo --driver bin/csi-driver
  go run ./demo --size 2048 --dir /mnt/fast-disk # more data, on another disk

Flags:
`

const helpEnd = `
Environment:
  NO_COLOR   if set, no colours. There are none anyway if the output is a file
  TMPDIR     where the temporary directory goes if --dir is not given

It exits with 0 if every check held, with 1 if one did not, with 2 if the
command line makes no sense, and with 130 if it was interrupted.
`

// options are the command line.
type options struct {
	driver  string // path of csi-driver
	dir     string // where the temporary directory goes
	fsType  string // of the filesystem volumes; empty is for the machine to say
	size    int64  // of the data to write, bytes
	verbose bool
}

// The bounds of --size, in MiB: less makes no difference to see, and more is
// another kind of test.
const (
	minSize = 64
	maxSize = 64 << 10
)

// overhead is what may be taken on disk beside twice the files, in bytes: the
// filesystems' own, above all their journals, and what the writer writes.
const overhead = 512 * mib

func parse(args []string, out io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.driver, "driver", filepath.Join("bin", "csi-driver"), "`path` of the csi-driver binary")
	f.StringVar(&o.dir, "dir", os.TempDir(), "`path` of the directory in which to make the temporary one")
	f.StringVar(&o.fsType, "fs", "", "`type` of the filesystem: ext4, xfs or btrfs\n(default: ext4; xfs where root may not grow ext4 in use)")
	size := f.Int64("size", 256, fmt.Sprintf("`MiB` of files to write, %d to %d; at most twice as much is\non disk at once, and %d MiB", minSize, maxSize, overhead/mib))
	f.BoolVar(&o.verbose, "verbose", false, "show the driver's log on standard error")
	err := f.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(out, help)
		f.VisitAll(func(f *flag.Flag) {
			value, usage := flag.UnquoteUsage(f)
			const indent = "\n                    "
			fmt.Fprintf(out, "  %-17s %s", "--"+f.Name+" "+value, strings.ReplaceAll(usage, "\n", indent))
			if value != "" && f.DefValue != "" {
				fmt.Fprintf(out, indent+"(default: %s)", f.DefValue)
			}
			fmt.Fprintln(out)
		})
		fmt.Fprint(out, helpEnd)
		return o, err
	}
	switch {
	case err != nil:
		return o, err
	case f.NArg() > 0:
		return o, fmt.Errorf("there are no arguments beside flags, and %q is one", f.Arg(0))
	case o.fsType != "" && !slices.Contains([]string{"ext4", "xfs", "btrfs"}, o.fsType):
		return o, fmt.Errorf("--fs %q is none of ext4, xfs and btrfs", o.fsType)
	case *size < minSize || *size > maxSize:
		return o, fmt.Errorf("--size %d is not from %d to %d", *size, minSize, maxSize)
	}
	o.size = *size * mib
	return o, nil
}

func main() {
	// A reader of the output that leaves must not end us at once: writing fails
	// instead, and everything is undone.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the whole program; it gives the exit code.
func run(ctx context.Context, args []string, out, errOut *os.File) int {
	o, err := parse(args, out)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(errOut, "demo: %v (see demo --help)\n", err)
		return exitUsage
	}
	d, err := prepare(o, out, errOut)
	if err != nil {
		fmt.Fprintf(errOut, "demo: %v\n", err)
		return exitFailure
	}
	err = d.show(ctx)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil:
		return exitInterrupted
	default:
		return exitFailure
	}
}

// prepare checks what can be told beforehand, and makes the directory.
func prepare(o options, out, errOut *os.File) (*demo, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("it needs root, for loop devices and mounts; run it as root, or with sudo")
	}
	binary, err := filepath.Abs(o.driver)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(binary); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("%s is not a program; build it with \"make build\", or name another with --driver", o.driver)
	}
	parent, err := filepath.EvalSymlinks(o.dir) // as the mount table will have it
	if err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	if parent, err = filepath.Abs(parent); err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(parent, &st); err != nil {
		return nil, fmt.Errorf("--dir: statfs %s: %w", parent, err)
	}
	if free, need := int64(st.Bavail)*st.Frsize, 2*o.size+overhead; free < need {
		return nil, fmt.Errorf("%s has %s free, and up to %s may be taken for a while; choose another place with --dir, or less data with --size", parent, human(free), human(need))
	}
	fsType, why, err := chooseFilesystem(o.fsType)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, "orlop-demo-")
	if err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	d := &demo{dir: dir, size: o.size, fsType: fsType, why: why, out: newReport(out), driver: newDriver(binary, dir), errOut: errOut}
	if o.verbose {
		d.driver.log.also = errOut
		d.out.overwrite = false
	}
	return d, nil
}

// chooseFilesystem gives the type of filesystem to show, and why if it is not
// the usual one; wanted may be empty.
func chooseFilesystem(wanted string) (fsType, why string, err error) {
	if wanted == "xfs" || wanted == "btrfs" {
		return wanted, "", nil
	}
	may, err := mayGrowExt4()
	if err != nil || may {
		return "ext4", "", err
	}
	const lacks = "root lacks CAP_SYS_RESOURCE here, without which ext4 cannot grow in use"
	if wanted == "" {
		return "xfs", lacks, nil
	}
	return "", "", errors.New("--fs ext4: " + lacks + "; try xfs or btrfs")
}

// show plays the steps and tells of them. It undoes everything, whatever
// happens.
func (d *demo) show(ctx context.Context) (err error) {
	defer func() {
		if cleanErr := d.clean(); cleanErr != nil {
			fmt.Fprintf(d.errOut, "\nThis could not be undone, and is still there:\n%v\n", cleanErr)
			err = errors.Join(err, cleanErr)
		} else if err != nil {
			fmt.Fprintln(d.errOut, "\nEverything was undone; nothing is left behind.")
		}
	}()
	start := time.Now()
	d.out.intro(d.dir, d.size)
	for _, s := range steps {
		d.out.begin(s.title)
		if err := d.play(ctx, s); err != nil {
			d.out.fail(s.title)
			d.explain(ctx, err)
			return err
		}
	}
	d.out.table(time.Since(start), d.peak)
	return nil
}

// play does one step and reports it. A writer that failed meanwhile fails it.
func (d *demo) play(ctx context.Context, s step) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	before, start := d.taken, time.Now()
	r, err := s.do(d, ctx)
	if err == nil && d.writer != nil {
		err = d.writer.failure()
	}
	if err != nil {
		return err
	}
	if r.took == 0 {
		r.took = time.Since(start)
	}
	if d.taken, err = d.blocks(); err != nil {
		return err
	}
	d.peak = max(d.peak, d.taken)
	d.out.done(s.title, r, d.taken-before)
	return d.out.err
}

// explain tells why a step failed, with the end of what the driver had to say.
func (d *demo) explain(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(d.errOut, "\nInterrupted; undoing everything.")
		return
	case d.out.err != nil:
		fmt.Fprintf(d.errOut, "\n%v; undoing everything.\n", d.out.err)
		return
	}
	fmt.Fprintf(d.errOut, "\n%v\n", err)
	if outcome, ok := d.driver.gone(); ok {
		fmt.Fprintf(d.errOut, "csi-driver has ended: %s\n", outcome)
	}
	if tail := d.driver.log.tail(15); tail != "" {
		fmt.Fprintf(d.errOut, "\nThe end of the driver's log:\n  %s\n", strings.ReplaceAll(tail, "\n", "\n  "))
	}
}
