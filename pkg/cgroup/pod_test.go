package cgroup

import "testing"

func TestAPodIsToldByTheKubeletsPaths(t *testing.T) {
	const uid = "0a1b2c3d-0000-4000-8000-0123456789ab"
	for target, want := range map[string]string{
		"/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc-1/mount":               uid,
		"/data/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc-1/mount":                  uid,
		"/pods/0123456789abcdef0123456789abcdef/volumes/kubernetes.io~csi/v/mount":              "0123456789abcdef0123456789abcdef", // of a static pod
		"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/" + uid:         uid,
		"/var/lib/kubelet/plugins/kubernetes.io/csi/csi.orlop.dev/0123456789abcdef/globalmount": "", // staged
		"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/staging/pvc-1":                "",
		"/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~empty-dir/pvc-1/mount":         "",
		"/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc-1":                     "",
		"/var/lib/kubelet/pods//volumes/kubernetes.io~csi/pvc-1/mount":                          "",
		"/srv/mount": "",
		"mount":      "",
	} {
		pod, volume := Target(target)
		if want != "" && volume != "pvc-1" && volume != "v" || want == "" && volume != "" {
			t.Errorf("Target(%s) = %q, %q", target, pod, volume)
		}
		if pod != want {
			t.Errorf("Target(%s) = %q, want %q", target, pod, want)
		}
	}
}
