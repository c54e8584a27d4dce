package cluster

import (
	"context"
)

// pauseImage holds a pod's namespaces.
const pauseImage = "localhost/orlop-pause:1"

// load imports the images that a node does not have yet.
func (c *Cluster) load(ctx context.Context, n *Node) error {
	archives, err := c.builder.Images(ctx)
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if err := n.machine.run(ctx, program("ctr"), "--namespace", "k8s.io", "images", "import", archive); err != nil {
			return err
		}
	}
	return nil
}
