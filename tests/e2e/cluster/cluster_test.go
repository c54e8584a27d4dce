package cluster

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestImagesAreThoseOfTheManifests(t *testing.T) {
	const manifests = `apiVersion: v1
kind: ConfigMap
data:
  config.yaml: |
    image: not this one
---
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      initContainers:
      - {name: first, image: example.com/first:1}
      containers:
      - {name: a, image: example.com/a:1}
      - {name: b, image: example.com/a:1}
---
# nothing
`
	names, err := imageNames(manifests)
	if want := []string{"example.com/a:1", "example.com/first:1"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("images %q (%v), want %q", names, err, want)
	}
}

// The cluster's addresses are none that this machine has a route to already.
func TestNetworkClashesWithNothing(t *testing.T) {
	used, err := routes()
	if err != nil {
		t.Fatal(err)
	}
	n, err := chooseNetwork()
	if err != nil {
		t.Fatal(err)
	}
	for _, route := range used {
		if route.Overlaps(netip.MustParsePrefix(n.whole())) {
			t.Errorf("chose %s, and there is a route to %s", n.whole(), route)
		}
	}
	for _, part := range []string{n.services(), n.pods(), n.podsOf(1), n.podsOf(Nodes), n.api() + "/32", n.host() + "/32", n.node(Nodes) + "/32"} {
		if !netip.MustParsePrefix(n.whole()).Overlaps(netip.MustParsePrefix(part)) {
			t.Errorf("%s is not in %s", part, n.whole())
		}
	}
}

// Loop devices of a directory are found by the files in it, also those that are on
// another of them or in its filesystem, and no others are.
func TestLoopDevicesOfADirectoryAreDetached(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this needs root, as all of make e2e does")
	}
	run := func(name string, args ...string) string {
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	attach := func(file, size string) string {
		run("truncate", "--size", size, file)
		device := run("losetup", "--find", "--show", file)
		t.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
		return device
	}
	dir, other := t.TempDir(), t.TempDir()
	bystander := attach(filepath.Join(other, "disk"), "64M")
	outer := attach(filepath.Join(dir, "disk"), "64M")
	run("mkfs.ext4", "-q", outer)
	mounted := filepath.Join(other, "mounted")
	run("mkdir", mounted)
	run("mount", outer, mounted)
	t.Cleanup(func() { _ = exec.Command("umount", mounted).Run() })
	inner := attach(filepath.Join(mounted, "disk"), "1M")
	holder := run("losetup", "--find", "--show", inner)
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", holder).Run() })

	found, err := loops(dir)
	if want := []string{holder, inner, outer}; err != nil || !slices.Equal(found, want) {
		t.Errorf("loops found %q (%v), want %q", found, err, want)
	}
	run("umount", "--lazy", mounted) // as when a mount namespace ends: the device below is busy until then
	if err := detachLoops(t.Context(), dir); err != nil {
		t.Error(err)
	}
	left, err := attachedLoops()
	if err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{holder, inner, outer} {
		if _, there := left[device]; there {
			t.Errorf("%s is still attached", device)
		}
	}
	if _, there := left[bystander]; !there {
		t.Errorf("%s was detached", bystander)
	}
}
