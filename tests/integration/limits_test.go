//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/orlop-csi/orlop/tests/harness"
)

// limParameters makes CreateVolume ask for limits, as key, value, key, value.
func limParameters(pairs ...string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) { r.MutableParameters = limMap(pairs...) }
}

func limMap(pairs ...string) map[string]string {
	parameters := map[string]string{}
	for i := 0; i+1 < len(pairs); i += 2 {
		parameters[pairs[i]] = pairs[i+1]
	}
	return parameters
}

func limModify(d *harness.Driver, id string, pairs ...string) error {
	_, err := d.ControllerModifyVolume(d.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: limMap(pairs...)})
	return err
}

// limVolume is a volume that is staged, for pods.
type limVolume struct {
	name, id string
	kind     dataKind
	node     *harness.Driver // where it is
}

func limCreate(d, node *harness.Driver, kind dataKind, pairs ...string) limVolume {
	v := limVolume{name: "pvc-" + kind.name, kind: kind, node: node}
	v.id = d.Create(v.name, kind.size, kind.capability, limParameters(pairs...)).GetVolumeId()
	return v
}

func (v limVolume) stage(t *testing.T) {
	t.Helper()
	_, err := v.node.NodeStageVolume(v.node.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.node.Staging(v.name), VolumeCapability: v.kind.capability,
	})
	dataMust(t, err)
}

// publish publishes the volume for a pod and gives the path.
func (v limVolume) publish(pod *harness.Pod) (target string, err error) {
	target = pod.Target(v.node, v.name, v.kind.isBlock())
	_, err = v.node.NodePublishVolume(v.node.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.node.Staging(v.name), TargetPath: target, VolumeCapability: v.kind.capability,
	})
	return target, err
}

func (v limVolume) unpublish(t *testing.T, pod *harness.Pod) {
	t.Helper()
	_, err := v.node.NodeUnpublishVolume(v.node.Context(), &csi.NodeUnpublishVolumeRequest{
		VolumeId: v.id, TargetPath: pod.Target(v.node, v.name, v.kind.isBlock()),
	})
	dataMust(t, err)
}

// limKernel is all that the kernel limits in a cgroup.
func limKernel(t *testing.T, cgroup string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(cgroup, "blkio.throttle.*_device"))
	dataMust(t, err)
	var all strings.Builder
	for _, file := range append(files, filepath.Join(cgroup, "io.max")) {
		if text, err := os.ReadFile(file); err == nil && len(text) > 0 {
			all.WriteString(filepath.Base(file) + " " + string(text))
		}
	}
	return all.String()
}

// A volume's I/O is what its limits say, from the first on, when they are
// changed under the pod that uses it, and when the driver has been killed and
// started again; and as fast as it can be once they are lifted.
func TestLimitsHoldForThePodThatUsesTheVolume(t *testing.T) {
	for _, kind := range []dataKind{nodeExt4, dataKinds[1], nodeBlock} {
		t.Run(kind.name, func(t *testing.T) {
			d := harness.Start(t, harness.FilePool("2Gi"))
			v := limCreate(d, d, kind, "writeBandwidth", "512Ki", "readIOPS", "20")
			v.stage(t)
			pod := harness.NewPod(t, "", "")
			sandbox := pod.Container("sandbox") // is there before the volume is
			target, err := v.publish(pod)
			dataMust(t, err)
			file := v.kind.file(target)
			dataFill(t, file, 16*dataMiB)

			container := pod.Container("app") // the containers come afterwards
			writer := pod.Load(container, file, 64<<10, true)
			writer.Settles("writeBandwidth 512Ki, by 64 KiB", 8)
			reader := pod.Load(sandbox, file, 4<<10, false)
			reader.Settles("readIOPS 20", 20)

			dataMust(t, limModify(d, v.id, "writeBandwidth", "32Ki")) // two seconds an operation
			if rate := writer.Rate(5 * time.Second); rate > 1 {
				t.Errorf("writeBandwidth 32Ki: %.1f operations a second, want 0.5", rate)
			}
			dataMust(t, limModify(d, v.id, "writeBandwidth", "2Mi"))
			writer.Settles("writeBandwidth 2Mi", 32)
			dataMust(t, limModify(d, v.id, "writeBandwidth", "1Mi", "readIOPS", "40"))
			writer.Settles("writeBandwidth 1Mi", 16)
			reader.Settles("readIOPS 40", 40)

			d.Kill()
			d.Start()
			writer.Stop() // the containers of a pod may have a limit together
			later := pod.Load(pod.Container("later"), file, 64<<10, true)
			dataMust(t, limModify(d, v.id, "writeBandwidth", "", "writeIOPS", "20"))
			later.Settles("writeIOPS 20, after a restart", 20)

			dataMust(t, limModify(d, v.id, "writeIOPS", "", "readIOPS", ""))
			later.Exceeds("no limit", 30)
			reader.Exceeds("no limit", 60)
			for _, cgroup := range []string{pod.Cgroup, sandbox, container} {
				if limKernel(t, cgroup) != "" {
					t.Errorf("%s has limits after they were lifted", cgroup)
				}
			}
		})
	}
}

// Limits hold after a restart for the containers that began while the driver was
// away, and for those that begin later, without any call.
func TestLimitsHoldAfterARestart(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	v := limCreate(d, d, nodeExt4, "writeIOPS", "20")
	v.stage(t)
	pod := harness.NewPod(t, "", "")
	target, err := v.publish(pod)
	dataMust(t, err)
	file := v.kind.file(target)
	dataFill(t, file, 16*dataMiB)
	d.Kill()
	meanwhile := pod.Load(pod.Container("meanwhile"), file, 4<<10, true)
	meanwhile.Exceeds("no limit for a container that nobody saw", 30)
	d.Start()
	meanwhile.Settles("writeIOPS 20, from the start on", 20)
	meanwhile.Stop()
	pod.Load(pod.Container("later"), file, 4<<10, true).Settles("writeIOPS 20", 20)
}

// The router changes limits on the node that has the volume. Each pod that uses
// a volume has its limits for itself.
func TestLimitsAreChangedThroughTheRouter(t *testing.T) {
	f := harness.StartFleet(t, harness.FilePool("2Gi"), harness.FilePool("1Gi"))
	v := limCreate(f.Driver, f.Nodes[0], nodeExt4, "writeIOPS", "20")
	v.stage(t)
	var loads []*harness.Load
	for range 2 {
		pod := harness.NewPod(t, "", "")
		target, err := v.publish(pod)
		dataMust(t, err)
		dataFill(t, v.kind.file(target), 16*dataMiB)
		loads = append(loads, pod.Load(pod.Container("app"), v.kind.file(target), 4<<10, true))
	}
	for _, load := range loads {
		load.Settles("writeIOPS 20", 20)
	}
	dataMust(t, limModify(f.Driver, v.id, "writeIOPS", "40"))
	for _, load := range loads {
		load.Settles("writeIOPS 40", 40)
	}
	ctlWant(t, "a bad value", limModify(f.Driver, v.id, "writeIOPS", "none"), codes.InvalidArgument, "node-1", "writeIOPS", "none")
	ctlWant(t, "no volume", limModify(f.Driver, v.id+"x", "writeIOPS", "60"), codes.NotFound)
}

// What is refused changes nothing: not the record, not what the kernel does.
func TestBadLimitsChangeNothing(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	v := limCreate(d, d, nodeBlock, "writeIOPS", "30")
	v.stage(t)
	pod := harness.NewPod(t, "", "")
	container := pod.Container("app")
	_, err := v.publish(pod)
	dataMust(t, err)
	record, kernel := ctlState(t, d, "default"), limKernel(t, pod.Cgroup)+limKernel(t, container)
	for _, c := range []struct {
		rule  string
		id    string
		pairs []string
		code  codes.Code
		words []string
	}{
		{"an unknown one", v.id, []string{"iops", "1"}, codes.InvalidArgument, []string{"iops", "readIOPS", "writeIOPS", "readBandwidth", "writeBandwidth"}},
		{"an unknown one beside a good one", v.id, []string{"writeIOPS", "50", "iops", "1"}, codes.InvalidArgument, []string{"iops"}},
		{"a bad one beside a good one", v.id, []string{"writeIOPS", "50", "readIOPS", "-5"}, codes.InvalidArgument, []string{"readIOPS", "-5"}},
		{"zero", v.id, []string{"writeIOPS", "0"}, codes.InvalidArgument, []string{"writeIOPS", "empty"}},
		{"too many", v.id, []string{"writeIOPS", "5G"}, codes.InvalidArgument, []string{"writeIOPS"}},
		{"a fraction", v.id, []string{"writeBandwidth", "5000500m"}, codes.InvalidArgument, []string{"writeBandwidth"}},
		{"no volume", "", []string{"writeIOPS", "1"}, codes.InvalidArgument, []string{"volume_id"}},
		{"a volume that is not there", v.id + "x", []string{"writeIOPS", "1"}, codes.NotFound, nil},
		{"an ID that makes no sense", "v", []string{"writeIOPS", "1"}, codes.NotFound, nil},
		{"nothing", v.id, nil, codes.OK, nil},
		{"what is so already", v.id, []string{"writeIOPS", "30", "readIOPS", ""}, codes.OK, nil},
	} {
		ctlWant(t, c.rule, limModify(d, c.id, c.pairs...), c.code, c.words...)
		ctlSame(t, c.rule, record, ctlState(t, d, "default"))
		ctlSame(t, c.rule, kernel, limKernel(t, pod.Cgroup)+limKernel(t, container))
	}
	_, err = d.CreateVolume(d.Context(), ctlRequest(v.name, limParameters("writeIOPS", "31"), ctlCapabilities(v.kind.capability), ctlRequired(v.kind.size)))
	ctlWant(t, "the volume of that name with other limits", err, codes.AlreadyExists, "limits")
	for pairs, confirmed := range map[[2]string]bool{{"readIOPS", "7"}: true, {"readIOPS", "0"}: false} {
		got, err := d.ValidateVolumeCapabilities(d.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: v.id, VolumeCapabilities: []*csi.VolumeCapability{v.kind.capability}, MutableParameters: limMap(pairs[:]...),
		})
		dataMust(t, err)
		if (got.GetConfirmed() != nil) != confirmed || confirmed && got.GetConfirmed().GetMutableParameters()["readIOPS"] != "7" {
			t.Errorf("ValidateVolumeCapabilities with %v: %v", pairs, got)
		}
	}
	ctlSame(t, "all this", record, ctlState(t, d, "default"))
}

// A volume with limits is published only where they hold; where nobody tells of
// a pod, there is none whose they could be.
func TestLimitsArePartOfThePublication(t *testing.T) {
	d := harness.Start(t, harness.FilePool("2Gi"))
	for _, kind := range []dataKind{nodeExt4, nodeBlock} {
		t.Run(kind.name, func(t *testing.T) {
			d := d.In(t)
			v := limCreate(d, d, kind, "writeIOPS", "30")
			v.stage(t)
			stranger := harness.PodWithoutCgroup(t)
			target, err := v.publish(stranger)
			ctlWant(t, "a pod without a cgroup", err, codes.Unavailable, stranger.UID)
			if _, err := os.Lstat(target); err == nil {
				t.Error("what was refused left its target path")
			}
			free, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
				VolumeId: v.id, StagingTargetPath: d.Staging(v.name), TargetPath: d.Target(v.name), VolumeCapability: kind.capability,
			})
			if err != nil {
				t.Errorf("at a path that is no pod's: %v, %v", free, err)
			}

			pod := harness.NewPod(t, "", "")
			container := pod.Container("app")
			for range 2 {
				_, err := v.publish(pod)
				dataMust(t, err)
				if limKernel(t, pod.Cgroup) == "" || !pod.Unified && limKernel(t, container) == "" {
					t.Error("published without limits")
				}
			}
			v.unpublish(t, pod)
			v.unpublish(t, pod)
			if limKernel(t, pod.Cgroup)+limKernel(t, container) != "" {
				t.Error("the pod has limits after it has left the volume")
			}
			_, err = d.NodeUnpublishVolume(d.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: d.Target(v.name)})
			dataMust(t, err)
			dataMust(t, limModify(d, v.id, "writeIOPS", ""))
			_, err = v.publish(stranger) // without limits nobody looks for a cgroup
			dataMust(t, err)
			v.unpublish(t, stranger)
		})
	}
}

// A read-only publication of a block volume has a device of its own, and its
// limits on that.
func TestLimitsHoldForAReadOnlyPublication(t *testing.T) {
	d := harness.Start(t, harness.FilePool("1Gi"))
	v := limCreate(d, d, nodeBlock, "readIOPS", "20")
	v.stage(t)
	pod := harness.NewPod(t, "", "")
	target := pod.Target(d, v.name, true)
	_, err := d.NodePublishVolume(d.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: d.Staging(v.name), TargetPath: target, VolumeCapability: v.kind.capability, Readonly: true,
	})
	dataMust(t, err)
	load := pod.Load(pod.Container("app"), target, 4<<10, false)
	load.Settles("readIOPS 20", 20)
	dataMust(t, limModify(d, v.id, "readIOPS", "40"))
	load.Settles("readIOPS 40", 40)
}
