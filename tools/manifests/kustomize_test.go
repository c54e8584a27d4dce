package main

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/orlop-csi/orlop/pkg/config"
)

// TestKustomizeAppliesTheChart: the two ways to install differ in the namespace,
// which Helm makes by itself, and in what Helm writes on its objects.
func TestKustomizeAppliesTheChart(t *testing.T) {
	want, got := chartObjects(t, nil), kustomizeObjects(t, kubernetes)
	if got["Namespace/"+namespace] == nil {
		t.Errorf("there is no namespace")
	}
	delete(got, "Namespace/"+namespace)
	for _, object := range want {
		labels := object.GetLabels()
		for _, label := range []string{"app.kubernetes.io/managed-by", "app.kubernetes.io/instance", "helm.sh/chart"} {
			if labels[label] == "" {
				t.Errorf("%s has no label %s", object.GetName(), label)
			}
			delete(labels, label)
		}
	}
	delete(get[*appsv1.DaemonSet](t, want, "DaemonSet/orlop-node").Spec.Template.Annotations, "checksum/pools")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("chart (-) and kustomize (+) differ:\n%s", diff)
	}
}

func TestOverlaysMakeObjectsOfTheAPI(t *testing.T) {
	overlays, err := filepath.Glob(filepath.Join(kubernetes, "overlays", "*"))
	if err != nil || len(overlays) == 0 {
		t.Fatalf("there are no overlays: %v", err)
	}
	for _, dir := range overlays {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			all := kustomizeObjects(t, dir)
			for name, text := range get[*corev1.ConfigMap](t, all, "ConfigMap/orlop-pools").Data {
				if _, err := config.Parse([]byte(text)); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

func TestWithoutSnapshotsIsTheChartWithoutThem(t *testing.T) {
	all := kustomizeObjects(t, filepath.Join(kubernetes, "overlays/without-snapshots"))
	want := podSpecs(chartObjects(t, parseValues(t, "snapshots: {enabled: false}")))
	if diff := cmp.Diff(want["Deployment/orlop-controller"], podSpecs(all)["Deployment/orlop-controller"]); diff != "" {
		t.Errorf("chart (-) and kustomize (+) differ:\n%s", diff)
	}
	if all["VolumeSnapshotClass/orlop"] != nil {
		t.Error("the class is there")
	}
}

// TestGroupSnapshotsAreAsOfTheChart: the overlay adds the class that the chart
// makes.
func TestGroupSnapshotsAreAsOfTheChart(t *testing.T) {
	const name = "VolumeGroupSnapshotClass/orlop"
	all := kustomizeObjects(t, filepath.Join(kubernetes, "overlays/group-snapshots"))
	chart := chartObjects(t, parseValues(t, "snapshots: {groups: {enabled: true}}"))
	want, got := get[*groupsnapshotv1.VolumeGroupSnapshotClass](t, chart, name), get[*groupsnapshotv1.VolumeGroupSnapshotClass](t, all, name)
	if want.Driver != got.Driver || want.DeletionPolicy != got.DeletionPolicy {
		t.Errorf("chart %v and kustomize %v differ", want, got)
	}
	if chartObjects(t, parseValues(t, "{}"))[name] != nil || chartObjects(t, parseValues(t, "snapshots: {enabled: false, groups: {enabled: true}}"))[name] != nil {
		t.Error("the class is there without its CRDs having been promised")
	}
}

// TestNodePoolsAreAsOfTheChart: the overlay's second DaemonSet is the one that
// the chart makes of nodePools.
func TestNodePoolsAreAsOfTheChart(t *testing.T) {
	all := kustomizeObjects(t, filepath.Join(kubernetes, "overlays/node-pools"))
	chart := chartObjects(t, parseValues(t, "nodePools: {nvme: [{name: default, source: {device: /dev/disk/by-id/nvme-eui.0025388b71b2e8a1}}]}"))
	for _, name := range []string{"DaemonSet/orlop-node", "DaemonSet/orlop-node-nvme"} {
		want, got := get[*appsv1.DaemonSet](t, chart, name).Spec, get[*appsv1.DaemonSet](t, all, name).Spec
		delete(want.Template.Annotations, "checksum/pools")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: chart (-) and kustomize (+) differ:\n%s", name, diff)
		}
	}
	want, got := get[*corev1.ConfigMap](t, chart, "ConfigMap/orlop-pools").Data, get[*corev1.ConfigMap](t, all, "ConfigMap/orlop-pools").Data
	for name, text := range want {
		a, err := config.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		b, err := config.Parse([]byte(got[name]))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(a, b); diff != "" {
			t.Errorf("%s: chart (-) and kustomize (+) differ:\n%s", name, diff)
		}
	}
}

func TestCSIDriver(t *testing.T) {
	got := get[*storagev1.CSIDriver](t, kustomizeObjects(t, kubernetes), "CSIDriver/csi.orlop.dev").Spec
	want := storagev1.CSIDriverSpec{
		AttachRequired:       new(false),
		PodInfoOnMount:       new(true),
		RequiresRepublish:    new(false),
		StorageCapacity:      new(true),
		SELinuxMount:         new(true),
		FSGroupPolicy:        new(storagev1.FileFSGroupPolicy),
		VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent, storagev1.VolumeLifecycleEphemeral},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("want (-) and got (+) differ:\n%s", diff)
	}
}

func TestOnlyTheNodesContainerIsPrivileged(t *testing.T) {
	for workload, spec := range podSpecs(kustomizeObjects(t, kubernetes)) {
		if spec.HostNetwork || spec.HostPID || spec.HostIPC {
			t.Errorf("%s shares a namespace with its host", workload)
		}
		for _, c := range spec.Containers {
			s := c.SecurityContext
			if !*s.ReadOnlyRootFilesystem {
				t.Errorf("%s: %s can write to its root filesystem", workload, c.Name)
			}
			if workload == "DaemonSet/orlop-node" {
				continue
			}
			if s.Privileged != nil || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || s.Capabilities.Add != nil {
				t.Errorf("%s: %s has privileges: %v", workload, c.Name, s)
			}
		}
		if workload == "DaemonSet/orlop-node" {
			continue
		}
		if s := spec.SecurityContext; !*s.RunAsNonRoot || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: %v", workload, s)
		}
		for _, v := range spec.Volumes {
			if v.EmptyDir == nil {
				t.Errorf("%s: volume %s is not its own", workload, v.Name)
			}
		}
	}
}

func TestANodeCanOnlyAskForItsCertificate(t *testing.T) {
	all := kustomizeObjects(t, kubernetes)
	want := []rbacv1.PolicyRule{{
		APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"certificatesigningrequests"},
		Verbs: []string{"create", "watch"},
	}}
	if diff := cmp.Diff(want, get[*rbacv1.ClusterRole](t, all, "ClusterRole/orlop-node").Rules); diff != "" {
		t.Errorf("want (-) and got (+) differ:\n%s", diff)
	}
	for name, object := range all {
		var role rbacv1.RoleRef
		var subjects []rbacv1.Subject
		switch binding := object.(type) {
		case *rbacv1.ClusterRoleBinding:
			role, subjects = binding.RoleRef, binding.Subjects
		case *rbacv1.RoleBinding:
			role, subjects = binding.RoleRef, binding.Subjects
		default:
			continue
		}
		for _, s := range subjects {
			if s.Name == "orlop-node" && role.Name != "orlop-node" {
				t.Errorf("%s gives the node the role %s", name, role.Name)
			}
		}
	}
}

// TestNoRuleIsForEverything: no wildcard, and no secret but the one that is
// named.
func TestNoRuleIsForEverything(t *testing.T) {
	for name, object := range kustomizeObjects(t, kubernetes) {
		var rules []rbacv1.PolicyRule
		switch role := object.(type) {
		case *rbacv1.ClusterRole:
			rules = role.Rules
		case *rbacv1.Role:
			rules = role.Rules
		}
		for _, r := range rules {
			if slices.Contains(slices.Concat(r.APIGroups, r.Resources, r.Verbs), "*") {
				t.Errorf("%s: %v", name, r)
			}
			if slices.Contains(r.Resources, "secrets") && (name != "Role/orlop-controller" ||
				!slices.Equal(r.ResourceNames, []string{"orlop-ca"}) && !slices.Equal(r.Verbs, []string{"create"})) {
				t.Errorf("%s: %v", name, r)
			}
		}
	}
}
