package cgroup

import "regexp"

// Root is where the host's control groups are mounted. It is the same place in a
// container that is given the host's.
const Root = "/sys/fs/cgroup"

// kubeletTarget is the paths at which the kubelet publishes volumes, with the
// pod's UID and the name of the PersistentVolume in them: GetPath of
// csi_mounter.go and getPublishPath of csi_block.go in
// k8s.io/kubernetes/pkg/volume/csi.
var kubeletTarget = regexp.MustCompile(`/(?:pods/([^/]+)/volumes/kubernetes\.io~csi/([^/]+)/mount|kubernetes\.io/csi/volumeDevices/publish/([^/]+)/([^/]+))$`)

// Target tells the UID of the pod that a target path is for, and the name of the
// PersistentVolume; both are empty if it is not a path of the kubelet's. The path
// is as good as csi.storage.k8s.io/pod.uid of the volume_context, and is in the
// kernel's mount table for as long as the volume is published, whatever becomes
// of the driver.
func Target(path string) (pod, volume string) {
	if match := kubeletTarget.FindStringSubmatch(path); match != nil {
		return match[1] + match[4], match[2] + match[3]
	}
	return "", ""
}
