package build

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

const (
	// PauseImage holds the namespaces of a pod.
	PauseImage = "localhost/orlop-pause:1"
	// ToolsImage is what test pods run: see tools/Dockerfile.
	ToolsImage = "localhost/orlop-tools:1"

	driver = "csi-driver" // the last element of the driver's image name
)

// Image is an image in an archive that `ctr images import` reads.
type Image struct {
	Name    string
	Archive string
	Key     string // other content has another key
}

// Image makes an image, if it is not made yet, under the name by which manifests
// call it. The last element of the name says which: csi-driver, made by the
// repository's own Dockerfile; or a binary of [Builder.Binaries], made from
// scratch; or [PauseImage] or [ToolsImage].
func (b *Builder) Image(ctx context.Context, image string) (Image, error) {
	tag, err := name.NewTag(image)
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", image, err)
	}
	what := path.Base(tag.RepositoryStr())
	var dir string
	switch {
	case image == ToolsImage:
		dir, err = b.tools(ctx)
	case what == driver:
		dir, err = b.driver(ctx, tag)
	default:
		binaries, err := b.Binaries(ctx)
		if err != nil {
			return Image{}, err
		}
		file := binaries[what]
		if image == PauseImage {
			file = binaries["node"]
		}
		if file == "" {
			return Image{}, fmt.Errorf("image %s: nothing here makes it; tests/e2e/build can", image)
		}
		dir, err = b.scratch(ctx, tag, file)
		if err != nil {
			return Image{}, err
		}
	}
	return Image{Name: image, Archive: filepath.Join(dir, "image.tar"), Key: filepath.Base(dir)}, err
}

// scratch makes an image that has one static binary and nothing else.
func (b *Builder) scratch(ctx context.Context, tag name.Tag, binary string) (string, error) {
	key := hash(tag.Name(), filepath.Base(filepath.Dir(binary)), filepath.Base(binary))
	return b.cached(ctx, "image-"+path.Base(tag.RepositoryStr()), key, func(dir string) error {
		var layer bytes.Buffer
		if err := archive(&layer, binary); err != nil {
			return err
		}
		contents, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
		if err != nil {
			return err
		}
		image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
			OS: "linux", Architecture: runtime.GOARCH,
			Config: v1.Config{Entrypoint: []string{"/" + filepath.Base(binary)}},
		})
		if err != nil {
			return err
		}
		if image, err = mutate.AppendLayers(image, contents); err != nil {
			return err
		}
		return tarball.WriteToFile(filepath.Join(dir, "image.tar"), tag, image)
	})
}

// archive writes a tar file with one program at its root.
func archive(to io.Writer, program string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	w := tar.NewWriter(to)
	if err := w.WriteHeader(&tar.Header{Name: filepath.Base(program), Mode: 0o755, Size: int64(len(data))}); err != nil {
		return fmt.Errorf("archive %s: %w", program, err)
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	return w.Close()
}

func (b *Builder) tools(ctx context.Context) (string, error) {
	context := b.moduleDir("tools")
	key := hash(ToolsImage)
	if err := hashTree(key, "tools", context); err != nil {
		return "", err
	}
	return b.cached(ctx, "image-tools", key, func(dir string) error {
		if err := b.buildah(ctx, "scripts/base-images"); err != nil {
			return err
		}
		if err := b.buildah(ctx, "buildah", "build", "--layers", "--pull-never", "--tag", ToolsImage, context); err != nil {
			return err
		}
		return b.export(ctx, ToolsImage, dir)
	})
}

// driver makes the image that `make image` makes, from the checkout as it is.
func (b *Builder) driver(ctx context.Context, tag name.Tag) (string, error) {
	key := hash(tag.Name())
	for _, part := range []string{"Dockerfile", ".dockerignore", "go.mod", "go.sum", "cmd", "pkg", "scripts/image", "scripts/base-images"} {
		if err := hashTree(key, part, filepath.Join(b.Repository, part), "_test.go"); err != nil {
			return "", err
		}
	}
	return b.cached(ctx, "image-"+driver, key, func(dir string) error {
		if err := b.buildah(ctx, "scripts/image", tag.Name(), tag.TagStr()); err != nil {
			return err
		}
		return b.export(ctx, tag.Name(), dir)
	})
}

func (b *Builder) export(ctx context.Context, image, dir string) error {
	return b.buildah(ctx, "buildah", "push", image, "docker-archive:"+filepath.Join(dir, "image.tar")+":"+image)
}

// buildah runs a command of the checkout with the storage and the isolation that
// scripts/image chooses, too.
func (b *Builder) buildah(ctx context.Context, command string, args ...string) error {
	cmd := exec.CommandContext(ctx, command, args...)
	cmd.Dir = b.Repository
	cmd.Env = append(os.Environ(), "STORAGE_DRIVER=overlay", "BUILDAH_ISOLATION=chroot")
	_, err := Output(cmd)
	return err
}
