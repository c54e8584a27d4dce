package build

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Images gives archives of images, for `ctr images import`.
func (b *Builder) Images(ctx context.Context) ([]string, error) {
	binaries, err := b.Binaries(ctx)
	if err != nil {
		return nil, err
	}
	pause, err := b.scratch(ctx, "localhost/orlop-pause:1", binaries["node"])
	return []string{pause}, err
}

// scratch makes an image that has one static binary, and gives its archive.
func (b *Builder) scratch(ctx context.Context, image, binary string) (string, error) {
	base := "image-" + filepath.Base(binary)
	dir, err := b.cached(ctx, base, hash(image, filepath.Dir(binary)), func(dir string) error {
		tag, err := name.NewTag(image)
		if err != nil {
			return err
		}
		var layer bytes.Buffer
		if err := archive(&layer, binary); err != nil {
			return err
		}
		contents, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
		if err != nil {
			return err
		}
		base, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
			OS: "linux", Architecture: runtime.GOARCH,
			Config: v1.Config{Entrypoint: []string{"/" + filepath.Base(binary)}},
		})
		if err != nil {
			return err
		}
		img, err := mutate.AppendLayers(base, contents)
		if err != nil {
			return err
		}
		return tarball.WriteToFile(filepath.Join(dir, "image.tar"), tag, img)
	})
	return filepath.Join(dir, "image.tar"), err
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
