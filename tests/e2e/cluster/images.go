package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/orlop-csi/orlop/tests/e2e/build"
	"sigs.k8s.io/yaml"
)

// A file has the images that each node is to have: the tools, and those that
// the manifests name.
var imagesFile = Dir + "/images.json"

func (c *Cluster) images() ([]build.Image, error) {
	data, err := os.ReadFile(imagesFile)
	if err != nil {
		return nil, err
	}
	var images []build.Image
	return images, json.Unmarshal(data, &images)
}

// buildImages builds what pods are made of: the tools, and what the manifests name.
func buildImages(ctx context.Context, b *build.Builder, manifests string) ([]build.Image, error) {
	names, err := imageNames(manifests)
	if err != nil {
		return nil, err
	}
	var images []build.Image
	for _, name := range append([]string{build.PauseImage, build.ToolsImage}, names...) {
		image, err := b.Image(ctx, name)
		if err != nil {
			return nil, err
		}
		images = append(images, image)
	}
	return images, nil
}

func writeImages(images []build.Image) error {
	data, err := json.MarshalIndent(images, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(imagesFile, data, 0o644)
}

// imageNames gives the images of all containers in manifests.
func imageNames(manifests string) ([]string, error) {
	var names []string
	var walk func(any)
	walk = func(value any) {
		switch value := value.(type) {
		case []any:
			for _, element := range value {
				walk(element)
			}
		case map[string]any:
			for key, element := range value {
				if name, is := element.(string); is && key == "image" && !slices.Contains(names, name) {
					names = append(names, name)
				}
				walk(element)
			}
		}
	}
	for document := range strings.SplitSeq(manifests, "\n---\n") {
		var object any
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			return nil, err
		}
		walk(object)
	}
	slices.Sort(names)
	return names, nil
}

// load imports the images that the node does not have yet. What it has is noted
// beside them, by content.
func (n *Node) load(ctx context.Context, images []build.Image) error {
	for _, image := range images {
		loaded := n.Path(filepath.Join("/var/lib/containerd", "orlop-e2e-"+strings.ReplaceAll(image.Name, "/", "_")))
		key, err := os.ReadFile(loaded)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if string(key) == image.Key {
			continue
		}
		if err := n.machine.run(ctx, program("ctr"), "--namespace", "k8s.io", "images", "import", image.Archive); err != nil {
			return err
		}
		if err := os.WriteFile(loaded, []byte(image.Key), 0o644); err != nil {
			return err
		}
	}
	return nil
}
