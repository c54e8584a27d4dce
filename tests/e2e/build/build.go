// Package build makes what a cluster consists of, from Go modules and Debian
// packages: the binaries of Kubernetes and of what it stands on, and container
// images. What was made is kept in the user's cache directory, under a name that
// is a hash of what it was made from.
//
// It writes nothing anywhere else, except that buildah keeps layers in its own
// storage.
package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// module is a Go module below tests/e2e/build, and the binaries made of it.
type module struct {
	name     string
	packages []string
	// binaries are the names of what go build makes, in the order of the packages;
	// links are other names of the first one.
	binaries, links []string
	ldflags         string
}

const kubernetes = "1.37.2" // as in kube/go.mod

var modules = []module{
	{name: "node", packages: []string{"."}, binaries: []string{"node"}},
	{
		name: "kube", packages: []string{"."}, binaries: []string{"kube"},
		links: []string{"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"},
		// What is not built by Kubernetes' own scripts has no version, and kubectl
		// refuses to talk to such a server.
		ldflags: "-X k8s.io/component-base/version.gitVersion=v" + kubernetes +
			" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=" + strings.Split(kubernetes, ".")[1],
	},
	{name: "etcd", packages: []string{"go.etcd.io/etcd/server/v3"}, binaries: []string{"server"}, links: []string{"etcd"}},
	{
		name: "containerd",
		packages: []string{
			"github.com/containerd/containerd/v2/cmd/containerd",
			"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
			"github.com/containerd/containerd/v2/cmd/ctr",
		},
		binaries: []string{"containerd", "containerd-shim-runc-v2", "ctr"},
	},
	{
		name: "provisioner", packages: []string{"github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"},
		binaries: []string{"csi-provisioner"},
	},
	{
		name: "sidecars",
		packages: []string{
			"github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
			"github.com/kubernetes-csi/external-snapshotter/v8/cmd/csi-snapshotter",
			"github.com/kubernetes-csi/external-snapshotter/v8/cmd/snapshot-controller",
		},
		binaries: []string{"csi-resizer", "csi-snapshotter", "snapshot-controller"},
	},
}

// Builder builds for one checkout of the repository.
type Builder struct {
	Repository string    // the checkout
	Cache      string    // where results are kept
	Log        io.Writer // progress
}

// New gives a builder for the checkout that the directory, or one above it, is.
func New(directory string, log io.Writer) (*Builder, error) {
	home, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	directory, err = filepath.Abs(directory)
	if err != nil {
		return nil, err
	}
	for repository := directory; ; repository = filepath.Dir(repository) {
		if _, err := os.Stat(filepath.Join(repository, "tests/e2e/build/kube/go.mod")); err == nil {
			return &Builder{Repository: repository, Cache: filepath.Join(home, "orlop-e2e"), Log: log}, nil
		}
		if repository == "/" {
			return nil, fmt.Errorf("%s is not in a checkout of Orlop: run it in one", directory)
		}
	}
}

// Binaries builds what is not built yet. It gives the file of each binary by name.
func (b *Builder) Binaries(ctx context.Context) (map[string]string, error) {
	files := map[string]string{}
	for _, m := range modules {
		dir, err := b.module(ctx, m)
		if err != nil {
			return nil, err
		}
		for _, name := range m.binaries {
			files[name] = filepath.Join(dir, name)
		}
		for _, name := range m.links {
			files[name] = filepath.Join(dir, name)
		}
	}
	return files, nil
}

// SnapshotCRDs gives the directory that has the custom resource definitions of
// snapshots and group snapshots.
func (b *Builder) SnapshotCRDs(ctx context.Context) (string, error) {
	dir, err := b.goCommand(ctx, "sidecars", "list", "-m", "-f", "{{.Dir}}", "github.com/kubernetes-csi/external-snapshotter/client/v8")
	return filepath.Join(strings.TrimSpace(dir), "config/crd"), err
}

func (b *Builder) moduleDir(name string) string {
	return filepath.Join(b.Repository, "tests/e2e/build", name)
}

func (b *Builder) module(ctx context.Context, m module) (string, error) {
	version, err := b.goCommand(ctx, m.name, "env", "GOVERSION")
	if err != nil {
		return "", err
	}
	ldflags := strings.TrimSpace("-s -w " + m.ldflags)
	key := hash(version, runtime.GOARCH, ldflags, m.packages, m.binaries, m.links)
	if err := hashTree(key, m.name, b.moduleDir(m.name)); err != nil {
		return "", err
	}
	return b.cached(ctx, m.name, key, func(dir string) error {
		// What is missing is downloaded here; a registry's hiccup is no reason to
		// begin again.
		if err := retry(ctx, 4, func() error {
			_, err := b.goCommand(ctx, m.name, append([]string{"list", "-deps"}, m.packages...)...)
			return err
		}); err != nil {
			return err
		}
		args := append([]string{"build", "-trimpath", "-ldflags", ldflags, "-o", dir + "/"}, m.packages...)
		if m.packages[0] == "." {
			args = append([]string{"build", "-trimpath", "-ldflags", ldflags, "-o", filepath.Join(dir, m.binaries[0])}, m.packages...)
		}
		if _, err := b.goCommand(ctx, m.name, args...); err != nil {
			return err
		}
		for _, name := range m.links {
			if err := os.Symlink(m.binaries[0], filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		for _, name := range m.binaries {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				return fmt.Errorf("go build made no %s: %w", name, err)
			}
		}
		return nil
	})
}

func (b *Builder) goCommand(ctx context.Context, module string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = b.moduleDir(module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-buildvcs=false")
	return Output(cmd)
}

// cached gives the directory in the cache that has the result of make, which is
// run if there is none.
func (b *Builder) cached(ctx context.Context, name string, key *digest, produce func(dir string) error) (string, error) {
	dir := filepath.Join(b.Cache, name+"-"+key.String())
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return "", err
	}
	if exists(dir) {
		now := time.Now() // the one unused for longest is removed first
		return dir, os.Chtimes(dir, now, now)
	}
	unlock, err := lock(ctx, filepath.Join(b.Cache, name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(dir) {
		return dir, nil
	}
	temporary, err := os.MkdirTemp(b.Cache, ".tmp-"+name+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temporary)
	if err := b.Step("building "+name, func() error { return produce(temporary) }); err != nil {
		return "", err
	}
	if err := os.Chmod(temporary, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(temporary, dir); err != nil {
		return "", err
	}
	return dir, b.prune(name, dir)
}

// kept is how many results of one name stay in the cache: several branches take
// turns on one machine.
const kept = 4

func (b *Builder) prune(name, newest string) error {
	dirs, err := filepath.Glob(filepath.Join(b.Cache, name+"-????????????????"))
	if err != nil || len(dirs) <= kept {
		return err
	}
	oldest, when := "", time.Now()
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err == nil && dir != newest && info.ModTime().Before(when) {
			oldest, when = dir, info.ModTime()
		}
	}
	if oldest == "" {
		return nil
	}
	return os.RemoveAll(oldest)
}

// Step tells that something begins, every half minute that it goes on, and how
// long it took.
func (b *Builder) Step(what string, do func() error) error {
	started := time.Now()
	fmt.Fprintf(b.Log, "%s…\n", what)
	ticker := time.NewTicker(30 * time.Second)
	defer ticker.Stop()
	done := make(chan error, 1)
	go func() { done <- do() }()
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			fmt.Fprintf(b.Log, "%s: done in %s\n", what, time.Since(started).Round(100*time.Millisecond))
			return nil
		case <-ticker.C:
			fmt.Fprintf(b.Log, "%s: %s so far\n", what, time.Since(started).Round(time.Second))
		}
	}
}

// Output runs a command and gives its standard output. An error has what it
// printed.
func Output(cmd *exec.Cmd) (string, error) {
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(errOut.String() + out.String())
		if len(text) > 4000 {
			text = "…" + text[len(text)-4000:]
		}
		return out.String(), fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, text)
	}
	return out.String(), nil
}

func retry(ctx context.Context, times int, do func() error) error {
	var err error
	for i := range times {
		if err = do(); err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(i+1) * 2 * time.Second):
		case <-ctx.Done():
		}
	}
	return err
}

// lock waits for an exclusive lock of a file, which is made.
func lock(ctx context.Context, path string) (func(), error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

type digest struct{ bytes.Buffer }

func hash(parts ...any) *digest {
	d := &digest{}
	fmt.Fprintf(d, "%q\n", parts)
	return d
}

func (d *digest) String() string {
	sum := sha256.Sum256(d.Bytes())
	return hex.EncodeToString(sum[:8])
}

// hashTree adds the names and contents of all files below a directory, without
// those whose names end in one of the suffixes.
func hashTree(d *digest, name, dir string, without ...string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || slices.ContainsFunc(without, func(suffix string) bool { return strings.HasSuffix(path, suffix) }) {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(dir, path)
		fmt.Fprintf(d, "%s/%s %x\n", name, relative, sha256.Sum256(data))
		return err
	})
}
