// Package upstream runs Kubernetes' own test suite for external storage drivers
// against Orlop on the cluster of this machine, and tells what came of it.
//
// The suite reads what the driver can do from a definition, ext4.yaml or xfs.yaml,
// and skips what it cannot. What the suite cannot do on this cluster is left out
// by name, each with a reason, in [exclusions].
package upstream

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/tests/e2e/build"
)

//go:embed ext4.yaml xfs.yaml limits.yaml
var definitions embed.FS

// pass is one run of the suite.
type pass struct {
	definition string
	specs      *regexp.Regexp // those that are run; nil: all
}

var passes = []pass{
	{definition: "ext4"},
	// What the first pass leaves out where ext4 cannot grow while it is mounted.
	{definition: "xfs", specs: regexp.MustCompile(`volume-expand|should support expansion of pvcs created for ephemeral pvcs`)},
}

// exclusion is specs that cannot run on this cluster, whatever the driver does.
type exclusion struct {
	specs  *regexp.Regexp
	reason string
}

var exclusions = []exclusion{
	{regexp.MustCompile(`\[Disruptive\]`), "stops and starts kubelets with systemctl, over SSH; tests/e2e does so in its own way"},
	{regexp.MustCompile(`\[Feature:SELinux\]`), "needs a kernel with SELinux"},
	{regexp.MustCompile(`with any volume data source`), "runs a volume populator and its controller from images that cannot be made here"},
	{
		regexp.MustCompile(`volume-modify-stress .*with a different volumeAttributesClass`),
		"changes claims that no pod has used yet, which are bound only if the StorageClass binds them immediately; Orlop's do not",
	},
	{
		regexp.MustCompile(`should use default VolumeGroupSnapshotClass when no class`),
		"puts a deletionPolicy among the parameters of its class, which are the driver's, and Orlop refuses those that it does not know",
	},
	{
		regexp.MustCompile(`VolumeGroupSnapshottable +should create snapshots for StatefulSet volumes`),
		"restores into claims of 1 MiB, whatever the source has; TestGroupSnapshot of tests/e2e restores a group",
	},
}

// external begins the name of every spec that is about the driver.
const external = "External Storage "

// Options is what a run is told.
type Options struct {
	Focus      *regexp.Regexp // of the specs, those that are run
	Procs      int            // specs that run at once; serial ones run alone
	Kubeconfig string
	Artifacts  string // directory for reports and logs; it is emptied
	Log        io.Writer
}

// Run runs all passes and writes a summary to the log. It is an error if a spec
// failed or did not run to its end, if an exclusion is of no use, or if there was
// nothing to run.
func Run(ctx context.Context, b *build.Builder, programs build.Upstream, o Options) error {
	if err := os.RemoveAll(o.Artifacts); err != nil {
		return err
	}
	var results []result
	for _, p := range passes {
		r := runner{pass: p, options: o, programs: programs, dir: filepath.Join(o.Artifacts, p.definition)}
		selected, err := r.prepare(ctx)
		if err != nil {
			return fmt.Errorf("pass %s: %w", p.definition, err)
		}
		if len(selected) == 0 {
			continue
		}
		var got result
		err = b.Step(fmt.Sprintf("pass %s: %d specs, log in %s", p.definition, len(selected), r.dir), func() (err error) {
			got, err = r.run(ctx, selected)
			return err
		})
		if err != nil {
			return err
		}
		results = append(results, got)
	}
	if len(results) == 0 {
		return fmt.Errorf("no spec matches %q", o.Focus)
	}
	return summarize(o.Log, results)
}

// runner runs one pass.
type runner struct {
	pass     pass
	options  Options
	programs build.Upstream
	dir      string
}

// prepare writes the definition, asks the suite which specs there are, and gives
// the names of those to run.
func (r runner) prepare(ctx context.Context) ([]string, error) {
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return nil, err
	}
	definition, err := definitions.ReadFile(r.pass.definition + ".yaml")
	if err != nil {
		return nil, err
	}
	if r.pass.definition == "ext4" && !canGrowExt4() {
		fmt.Fprintln(r.options.Log, "this machine has no CAP_SYS_RESOURCE, which the kernel wants for growing a mounted ext4: that is left to the pass xfs")
		offline := strings.Replace(string(definition), "onlineExpansion: true", "onlineExpansion: false", 1)
		definition = []byte(offline)
	}
	if err := os.WriteFile(r.file("driver.yaml"), definition, 0o644); err != nil {
		return nil, err
	}
	limits, err := definitions.ReadFile("limits.yaml") // which the definition names
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(r.file("limits.yaml"), limits, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(r.file("registries.yaml"), []byte("promoterE2eRegistry: "+build.UpstreamRegistry+"\n"), 0o644); err != nil {
		return nil, err
	}
	list := exec.CommandContext(ctx, r.programs.Suite, append([]string{"-ginkgo.dry-run", "-ginkgo.json-report=" + r.file("specs.json")}, r.flags()...)...)
	if out, err := r.in(list).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("listing the specs: %w\n%s", err, out)
	}
	specs, err := readReport(r.file("specs.json"))
	if err != nil {
		return nil, err
	}
	return choose(specs, r.pass.specs, r.options.Focus)
}

// choose gives the names of the specs that both expressions, if there are any,
// match, and no exclusion. An exclusion that is of no use is an error.
func choose(specs []spec, wanted ...*regexp.Regexp) ([]string, error) {
	var names []string
	used := make([]bool, len(exclusions))
	for _, s := range specs {
		if !strings.HasPrefix(s.name(), external) {
			continue
		}
		chosen := true
		for _, w := range wanted {
			chosen = chosen && (w == nil || w.MatchString(s.name()))
		}
		for i, e := range exclusions {
			if e.specs.MatchString(s.name()) {
				used[i], chosen = true, false
			}
		}
		if chosen {
			names = append(names, s.name())
		}
	}
	if i := slices.Index(used, false); i >= 0 {
		return nil, fmt.Errorf("the exclusion %q matches no spec: remove it", exclusions[i].specs)
	}
	return names, nil
}

// run runs the specs with these names.
func (r runner) run(ctx context.Context, names []string) (result, error) {
	log, err := os.Create(r.file("log"))
	if err != nil {
		return result{}, err
	}
	defer log.Close()
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = regexp.QuoteMeta(name)
	}
	args := append([]string{
		fmt.Sprintf("--procs=%d", r.options.Procs), "--timeout=4h", "--no-color",
		"--json-report=report.json", "--output-dir=" + r.dir,
		"--focus=(" + strings.Join(quoted, "|") + ")$", r.programs.Suite, "--",
	}, r.flags()...)
	cmd := exec.CommandContext(ctx, r.programs.Ginkgo, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) } // so that it removes what it made
	cmd.WaitDelay = 5 * time.Minute
	started := time.Now()
	runErr := r.in(cmd).Run()
	var exit *exec.ExitError
	if runErr != nil && !errors.As(runErr, &exit) || ctx.Err() != nil {
		return result{}, errors.Join(runErr, ctx.Err())
	}
	specs, err := readReport(r.file("report.json"))
	if err != nil {
		return result{}, errors.Join(runErr, err)
	}
	got := result{pass: r.pass.definition, dir: r.dir, took: time.Since(started)}
	for _, s := range specs {
		if !s.isSpec() && s.outcome() == failed || slices.Contains(names, s.name()) {
			got.specs = append(got.specs, s)
		}
	}
	if len(got.specs) < len(names) {
		return result{}, fmt.Errorf("of %d specs, %d are in the report", len(names), len(got.specs))
	}
	if runErr != nil && len(got.of(failed)) == 0 {
		return result{}, fmt.Errorf("no spec failed, but the suite did, see %s: %w", r.file("log"), runErr)
	}
	return got, nil
}

func (r runner) file(name string) string { return filepath.Join(r.dir, name) }

// flags are those of the suite itself.
func (r runner) flags() []string {
	return []string{
		"-kubeconfig=" + r.options.Kubeconfig, "-provider=skeleton", "-storage.testdriver=" + r.file("driver.yaml"), "-repo-root=" + r.dir,
		"-dump-logs-on-failure=true", "-delete-namespace-on-failure=true",
	}
}

// in has a command run with the suite's images under our names, and without
// files of its own elsewhere.
func (r runner) in(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = r.dir
	cmd.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+r.file("registries.yaml"))
	return cmd
}

// canGrowExt4 reports whether a process of this machine can have the capability
// with which the kernel lets a mounted ext4 grow.
func canGrowExt4() bool {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	return err == nil && has == 1
}
