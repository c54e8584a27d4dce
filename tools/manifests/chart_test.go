package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	corev1 "k8s.io/api/core/v1"

	"github.com/orlop-csi/orlop/pkg/config"
)

// That the chart has no icon is information, and not wrong.
func TestHelmFindsNothingWrongWithTheChart(t *testing.T) {
	for _, values := range []map[string]any{nil, valuesFrom(t, "testdata/everything.yaml")} {
		for _, m := range lint.RunAll(chartDir, values, namespace).Messages {
			if m.Severity > support.InfoSev {
				t.Error(m)
			}
		}
	}
}

func TestEveryValueMakesObjectsOfTheAPI(t *testing.T) {
	all := chartObjects(t, valuesFrom(t, "testdata/everything.yaml"))
	for _, name := range []string{
		"DaemonSet/orlop-node", "DaemonSet/orlop-node-nvme", "StorageClass/everything", "StorageClass/least",
		"VolumeAttributesClass/silver", "VolumeSnapshotClass/keep", "PodMonitor/orlop-node", "PodMonitor/orlop-controller",
	} {
		if all[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
}

func TestSwitchesLeaveNothingBehind(t *testing.T) {
	for text, gone := range map[string]string{
		"snapshots: {enabled: false}":     "(?i)snapshot",
		"networkPolicy: {enabled: false}": "NetworkPolicy",
		"storageClasses: []":              "StorageClass/",
		"snapshots: {classes: []}":        "VolumeSnapshotClass/",
	} {
		for name, object := range chartObjects(t, parseValues(t, text)) {
			if regexp.MustCompile(gone).MatchString(name) {
				t.Errorf("%s: %s is there", text, object.GetName())
			}
		}
	}
	controller := podSpecs(chartObjects(t, parseValues(t, "snapshots: {enabled: false}")))["Deployment/orlop-controller"]
	for _, c := range controller.Containers {
		if c.Name == "csi-snapshotter" {
			t.Error("snapshots.enabled=false leaves the csi-snapshotter")
		}
	}
}

func TestTheSchemaRefuses(t *testing.T) {
	for _, text := range []string{
		"nodes: {}",
		"node: {kubeletdir: /var/lib/kubelet}",
		"node: {stateDir: /var/lib/orlop/}",
		"node: {stateDir: orlop}",
		"node: {maxUnavailable: 0}",
		"node: {maxUnavailable: 0%}",
		"controller: {replicas: 0}",
		"podMonitor: {interval: 60}",
		"log: {format: xml}",
		"image: {tag: 1.0}",
		"pools: []",
		"pools: [{name: default}]",
		"pools: [{name: Default, source: {device: /dev/sdb}}]",
		"pools: [{name: default, source: {}}]",
		"pools: [{name: default, source: {device: /dev/sdb, directory: /srv}}]",
		"pools: [{name: default, source: {device: sdb}}]",
		"pools: [{name: default, source: {disk: /dev/sdb}}]",
		"pools: [{name: default, source: {file: {path: /srv/a.img}}}]",
		"pools: [{name: default, source: {file: {path: /srv/a.img, size: 20GB}}}]",
		"pools: [{name: default, source: {device: /dev/sdb}, reserve: 100%}]",
		"pools: [{name: default, source: {device: /dev/sdb}, overcommit: 0.5}]",
		"nodePools: {Big: [{name: default, source: {device: /dev/sdb}}]}",
		"nodePools: {big: []}",
		"storageClasses: [{name: fast, parameters: {fsType: ext4}}]",
		"storageClasses: [{name: fast, parameters: {csi.storage.k8s.io/fstype: zfs}}]",
		"storageClasses: [{name: fast, reclaimPolicy: Recycle}]",
		"storageClasses: [{volumeBindingMode: Immediate}]",
		"volumeAttributesClasses: [{name: silver, parameters: {iops: '5'}}]",
		"volumeAttributesClasses: [{name: silver, parameters: {readIOPS: 5}}]",
		"sidecars: {provisioner: {image: csi-provisioner}}",
		"sidecars: {provisioner: {tag: ''}}",
	} {
		if _, err := render(chartDir, parseValues(t, text), "Helm"); err == nil {
			t.Errorf("%s: was taken", text)
		}
	}
}

// TestTheDriverTakesTheConfiguration holds the schema and the template to what
// the driver reads.
func TestTheDriverTakesTheConfiguration(t *testing.T) {
	all := chartObjects(t, valuesFrom(t, "testdata/everything.yaml"))
	data := get[*corev1.ConfigMap](t, all, "ConfigMap/orlop-pools").Data
	for key, pools := range map[string][]string{
		"config.yaml":      {"default", "archive", "files", "state", "inside"},
		"config-nvme.yaml": {"default"},
	} {
		c, err := config.Parse([]byte(data[key]))
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		var names []string
		for _, p := range c.Pools {
			names = append(names, p.Name)
		}
		if !slices.Equal(names, pools) {
			t.Errorf("%s has the pools %v, not %v", key, names, pools)
		}
	}
}

// TestWhatPoolsNeedIsMounted: the directories that pools are in, each once, and
// none that the pod has anyway.
func TestWhatPoolsNeedIsMounted(t *testing.T) {
	specs := podSpecs(chartObjects(t, valuesFrom(t, "testdata/everything.yaml")))
	for workload, want := range map[string][]string{
		"DaemonSet/orlop-node":      {"/srv/images", "/srv/volumes", "/var/lib/orlop-of-this/disk"},
		"DaemonSet/orlop-node-nvme": {"/mnt/nvme"},
	} {
		spec, got := specs[workload], []string{}
		for _, m := range spec.Containers[0].VolumeMounts {
			if strings.HasPrefix(m.Name, "pool-") {
				got = append(got, m.MountPath)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s mounts %v for its pools, not %v", workload, got, want)
		}
	}
}

// TestTheDriverHasTheFlags: those of the manifests are in the driver's own
// reference, for the mode that the container runs.
func TestTheDriverHasTheFlags(t *testing.T) {
	reference, err := os.ReadFile("../../docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
	for workload, spec := range podSpecs(chartObjects(t, nil)) {
		args := spec.Containers[0].Args
		_, section, found := strings.Cut(string(reference), "\n## csi-driver "+args[0]+"\n")
		if !found {
			t.Fatalf("%s runs csi-driver %s, which the reference has not", workload, args[0])
		}
		section, _, _ = strings.Cut(section, "\n## ")
		for _, arg := range args[1:] {
			flag, _, _ := strings.Cut(arg, "=")
			if !regexp.MustCompile("`" + flag + "[ `]").MatchString(section) {
				t.Errorf("%s: csi-driver %s has no flag %s", workload, args[0], flag)
			}
		}
	}
}
