package cluster

import (
	"context"
	"encoding/json"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// pageSize is how many objects are asked for at once.
const pageSize = 500

// Claims is what of a driver the cluster names.
type Claims struct {
	Client *Client
	Driver string // the CSI driver's name
}

// Claimed gives the IDs of the volumes that PersistentVolumes name, and of the
// snapshots that VolumeSnapshotContents and VolumeGroupSnapshotContents do, as
// the API server has them now. snapshots is nil if the cluster does not know
// snapshots at all: then nothing can be said of any.
func (c Claims) Claimed(ctx context.Context) (volumes, snapshots map[string]struct{}, err error) {
	volumes = map[string]struct{}{}
	if err := c.volumes(ctx, func(v *core.PersistentVolume) { volumes[v.Spec.CSI.VolumeHandle] = struct{}{} }); err != nil {
		return nil, nil, err
	}
	snapshots = map[string]struct{}{}
	found, err := c.contents(ctx, "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents", snapshots)
	if err != nil {
		return nil, nil, wrap("volume snapshot contents", err)
	}
	if !found {
		return volumes, nil, nil
	}
	for _, version := range []string{"v1", "v1beta2", "v1beta1"} {
		found, err := c.contents(ctx, "/apis/groupsnapshot.storage.k8s.io/"+version+"/volumegroupsnapshotcontents", snapshots)
		if err != nil {
			return nil, nil, wrap("volume group snapshot contents", err)
		}
		if found {
			break
		}
	}
	return volumes, snapshots, nil
}

// volumes reads all PersistentVolumes of the driver.
func (c Claims) volumes(ctx context.Context, each func(*core.PersistentVolume)) error {
	options := meta.ListOptions{Limit: pageSize}
	for {
		page := &core.PersistentVolumeList{}
		if err := c.Client.core.Get().Resource("persistentvolumes").VersionedParams(&options, meta.ParameterCodec).Do(ctx).Into(page); err != nil {
			return wrap("persistent volumes", err)
		}
		for i := range page.Items {
			if s := page.Items[i].Spec.CSI; s != nil && s.Driver == c.Driver {
				each(&page.Items[i])
			}
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return nil
		}
	}
}

// content is what is needed of a VolumeSnapshotContent or a
// VolumeGroupSnapshotContent (snapshot.storage.k8s.io/v1,
// groupsnapshot.storage.k8s.io).
type content struct {
	Spec struct {
		Driver string `json:"driver"`
		Source struct {
			SnapshotHandle       string `json:"snapshotHandle"`
			GroupSnapshotHandles *struct {
				VolumeSnapshotHandles []string `json:"volumeSnapshotHandles"`
			} `json:"groupSnapshotHandles"`
		} `json:"source"`
	} `json:"spec"`
	Status struct {
		SnapshotHandle               string `json:"snapshotHandle"`
		VolumeSnapshotHandlePairList []pair `json:"volumeSnapshotHandlePairList"`
		VolumeSnapshotInfoList       []pair `json:"volumeSnapshotInfoList"`
	} `json:"status"`
}

// pair is a volume and its snapshot in a group.
type pair struct {
	SnapshotHandle string `json:"snapshotHandle"`
}

func (c content) handles() []string {
	handles := []string{c.Spec.Source.SnapshotHandle, c.Status.SnapshotHandle}
	if g := c.Spec.Source.GroupSnapshotHandles; g != nil {
		handles = append(handles, g.VolumeSnapshotHandles...)
	}
	for _, p := range append(c.Status.VolumeSnapshotHandlePairList, c.Status.VolumeSnapshotInfoList...) {
		handles = append(handles, p.SnapshotHandle)
	}
	return handles
}

// contents adds the snapshots that objects name, and reports whether the cluster
// has such objects at all.
func (c Claims) contents(ctx context.Context, path string, into map[string]struct{}) (found bool, err error) {
	err = each(ctx, c.Client, path, func(item content) {
		if item.Spec.Driver != c.Driver {
			return
		}
		for _, handle := range item.handles() {
			if handle != "" {
				into[handle] = struct{}{}
			}
		}
	})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// each reads all objects at a path, as far as T has their fields. It is for
// custom resources, of which there is no other form than JSON, and for where a
// name is all that is wanted of large ones.
func each[T any](ctx context.Context, c *Client, path string, do func(T)) error {
	options := meta.ListOptions{Limit: pageSize}
	for {
		raw, err := c.core.Get().AbsPath(path).VersionedParams(&options, meta.ParameterCodec).
			SetHeader("Accept", "application/json").Do(ctx).Raw()
		if err != nil {
			return err
		}
		var page struct {
			Metadata meta.ListMeta `json:"metadata"`
			Items    []T           `json:"items"`
		}
		if err := json.Unmarshal(raw, &page); err != nil {
			return err
		}
		for _, item := range page.Items {
			do(item)
		}
		if options.Continue = page.Metadata.Continue; options.Continue == "" {
			return nil
		}
	}
}
