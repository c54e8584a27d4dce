package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// The layouts of the kubelet's two drivers, for all classes of service, and below
// whatever root.
func TestAPodIsFoundWhereverTheKubeletPutsIt(t *testing.T) {
	const uid, other = "0a1b2c3d-0000-4000-8000-0123456789ab", "0a1b2c3d-0000-4000-8000-0123456789ac"
	const u, o = "0a1b2c3d_0000_4000_8000_0123456789ab", "0a1b2c3d_0000_4000_8000_0123456789ac"
	for _, c := range []struct{ dir, other string }{
		{"kubepods/burstable/pod" + uid, "kubepods/burstable/pod" + other},
		{"kubepods/besteffort/pod" + uid, "kubepods/burstable/pod" + other},
		{"kubepods/pod" + uid, "kubepods/pod" + other},
		{"node-1/kubepods/burstable/pod" + uid, "node-2/kubepods/burstable/pod" + other},
		{"podruntime/pods/kubepods/pod" + uid, "podruntime/runtime"},
		{"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + u + ".slice", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + o + ".slice"},
		{"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + u + ".slice", "system.slice/containerd.service"},
		{"kubepods.slice/kubepods-pod" + u + ".slice", "kubepods.slice/kubepods-pod" + o + ".slice"},
		{"system.slice/kind.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + u + ".slice", "user.slice"},
	} {
		root := t.TempDir()
		for _, dir := range []string{c.other + "/0123456789abcdef", c.dir + "/0123456789abcdef"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := findBelow(root, uid); err != nil || got != filepath.Join(root, c.dir) {
			t.Errorf("found %q, %v; want %s", got, err, c.dir)
		}
		if got, err := findBelow(root, "0a1b2c3d-0000-4000-8000-0123456789a"); err != nil || got != "" {
			t.Errorf("%s: found %q, %v for a part of a UID", c.dir, got, err)
		}
	}
}
