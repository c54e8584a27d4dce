package build

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// UpstreamRegistry is where the images of Kubernetes' suite are, by their names.
// They are ours, and so not called as if they came from Kubernetes' registry.
const UpstreamRegistry = "localhost/orlop-upstream"

// Upstream is Kubernetes' test suite for external storage drivers.
type Upstream struct {
	Suite  string // its program
	Ginkgo string // the program that runs it in several processes
	Images string // archive of the images of its pods
}

// Upstream builds what is not built yet of Kubernetes' suite.
func (b *Builder) Upstream(ctx context.Context) (Upstream, error) {
	version, err := b.goCommand(ctx, "upstream", "env", "GOVERSION")
	if err != nil {
		return Upstream{}, err
	}
	key := hash(version, runtime.GOARCH)
	if err := hashTree(key, "upstream", b.moduleDir("upstream")); err != nil {
		return Upstream{}, err
	}
	dir, err := b.cached(ctx, "upstream", key, func(dir string) error {
		programs := []string{"github.com/onsi/ginkgo/v2/ginkgo", "k8s.io/kubernetes/test/images/agnhost"}
		if err := retry(ctx, 4, func() error {
			_, err := b.goCommand(ctx, "upstream", append([]string{"list", "-deps", "-test", "."}, programs...)...)
			return err
		}); err != nil {
			return err
		}
		flags := []string{"-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
		if _, err := b.goCommand(ctx, "upstream", append(append([]string{"build"}, flags...), programs...)...); err != nil {
			return err
		}
		_, err := b.goCommand(ctx, "upstream", append(append([]string{"test", "-c"}, flags...), ".")...)
		return err
	})
	if err != nil {
		return Upstream{}, err
	}
	u := Upstream{Suite: filepath.Join(dir, "upstream.test"), Ginkgo: filepath.Join(dir, "ginkgo")}
	images, err := b.cached(ctx, "upstream-images", key, func(to string) error { return b.upstreamImages(ctx, u, dir, to) })
	u.Images = filepath.Join(images, "images.tar")
	return u, err
}

// upstreamImages makes the archive of all images that the suite names, of the
// programs in one directory, in another.
func (b *Builder) upstreamImages(ctx context.Context, u Upstream, programs, to string) error {
	if err := b.buildah(ctx, "scripts/base-images"); err != nil {
		return err
	}
	dockerfile := filepath.Join(b.moduleDir("upstream"), "Dockerfile")
	built := map[string]v1.Image{}
	for _, target := range []string{"tools", "agnhost"} {
		archive := filepath.Join(to, target+".tar")
		tag := UpstreamRegistry + "-" + target
		if err := b.buildah(ctx, "buildah", "build", "--layers", "--pull-never", "--target", target, "--file", dockerfile, "--tag", tag, programs); err != nil {
			return err
		}
		if err := b.buildah(ctx, "buildah", "push", tag, "docker-archive:"+archive); err != nil {
			return err
		}
		defer os.Remove(archive)
		image, err := tarball.ImageFromPath(archive, nil)
		if err != nil {
			return err
		}
		built[target] = image
	}

	registries := filepath.Join(to, "registries.yaml")
	if err := os.WriteFile(registries, []byte("promoterE2eRegistry: "+UpstreamRegistry+"\n"), 0o644); err != nil {
		return err
	}
	list := exec.CommandContext(ctx, u.Suite, "-images")
	list.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+registries)
	names, err := Output(list)
	if err != nil {
		return err
	}
	tagged := map[name.Reference]v1.Image{}
	for image := range strings.FieldsSeq(names) {
		tag, err := name.NewTag(image)
		if err != nil {
			return fmt.Errorf("the suite's image %q: %w", image, err)
		}
		tagged[tag] = built["tools"]
		if strings.HasSuffix(tag.RepositoryStr(), "/agnhost") {
			tagged[tag] = built["agnhost"]
		}
	}
	return tarball.MultiRefWriteToFile(filepath.Join(to, "images.tar"), tagged)
}
