//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/orlop-csi/orlop/pkg/driver"
	"github.com/orlop-csi/orlop/tests/harness"
)

// ctlRuns runs the driver's binary to its end.
func ctlRuns(t *testing.T, args ...string) (out, errOut string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Binary(t), args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

func TestVersionTellsWhatTheBinaryIs(t *testing.T) {
	out, errOut, code := ctlRuns(t, "version")
	if code != 0 || errOut != "" || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, "csi-driver ") || !strings.Contains(out, "linux/") {
		t.Errorf("version: %d, %q, %q", code, out, errOut)
	}
}

func TestHelpTellsOfEveryFlag(t *testing.T) {
	out, errOut, code := ctlRuns(t, "standalone", "--help")
	if code != 0 || errOut != "" {
		t.Errorf("--help: %d, %q", code, errOut)
	}
	for _, flag := range []string{"--config", "--endpoint", "--node-id", "--state-dir", "--metrics-address", "--shutdown-timeout", "--log-format", "-v"} {
		if !strings.Contains(out, flag) {
			t.Errorf("--help does not tell of %s", flag)
		}
	}
	for _, word := range []string{"pools:", "file:", "directory:", "device:", "reserve:", "overcommit:", "sparse"} {
		if !strings.Contains(out, word) {
			t.Errorf("--help does not tell of %s in the configuration", word)
		}
	}
}

func TestACommandLineThatMakesNoSenseIsRefusedInOneLine(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	ctlMust(t, os.WriteFile(config, []byte(harness.DirectoryPool(dir)), 0o600))
	base := []string{"standalone", "--config", config, "--state-dir", filepath.Join(dir, "state"), "--endpoint", "unix://" + filepath.Join(dir, "csi.sock")}
	for _, c := range []struct {
		args []string
		word string
	}{
		{nil, "standalone"},
		{[]string{"serve"}, "serve"},
		{[]string{"standalone"}, "--config"},
		{append(base, "--colour", "red"), "--colour"},
		{append(base, "more"), "more"},
		{append(base, "--endpoint", "tcp://127.0.0.1:1"), "--endpoint"},
		{append(base, "--endpoint", "unix://relative"), "--endpoint"},
		{append(base, "--endpoint", "unix:///"+strings.Repeat("a", 108)), "--endpoint"},
		{append(base, "--node-id", "a/b"), "--node-id"},
		{append(base, "--node-id", "../.."), "--node-id"},
		{append(base, "--state-dir", "relative"), "--state-dir"},
		{append(base, "--metrics-address", "9809"), "--metrics-address"},
		{append(base, "--log-format", "xml"), "--log-format"},
		{append(base, "-v", "much"), "-v"},
		{append(base, "--shutdown-timeout", "-1s"), "--shutdown-timeout"},
	} {
		out, errOut, code := ctlRuns(t, c.args...)
		if code != 2 || out != "" || strings.Count(errOut, "\n") != 1 || !strings.Contains(errOut, c.word) {
			t.Errorf("%q: %d, %q, %q; want exit code 2 and one line that says %s", c.args, code, out, errOut, c.word)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestASocketThatADeadDriverLeftIsReplaced(t *testing.T) {
	d := harness.Start(t, harness.FilePool("512Mi"))
	d.Kill()
	if info, err := os.Lstat(d.Socket); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Fatalf("a driver that was killed left %v, %v", info, err)
	}
	d.Start()
	info, err := os.Lstat(d.Socket)
	ctlMust(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("others than root may use the socket: %s", info.Mode())
	}
	d.Stop()
	if left, err := filepath.Glob(d.Socket + "*"); err != nil || len(left) > 0 {
		t.Errorf("a driver that ended left %v, %v", left, err)
	}
}

func TestASocketThatIsInUseIsRefused(t *testing.T) {
	d := harness.Start(t, harness.FilePool("512Mi"))
	v := d.Create("v", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	other := harness.New(t, harness.FilePool("512Mi"))
	tree := ctlTree(t, other.Dir)
	other.Args = []string{"--endpoint", "unix://" + d.Socket}
	ctlStartFails(t, other, "--endpoint", d.Socket)
	ctlSame(t, "the second driver's directories", tree, ctlTree(t, other.Dir))
	if got := ctlIDs(t, d); len(got) != 1 || got[0] != v {
		t.Errorf("the first driver has %v", got)
	}

	// Also by another program, and a file that is none.
	socket := filepath.Join(other.Dir, "other.sock")
	l, err := net.Listen("unix", socket)
	ctlMust(t, err)
	defer l.Close()
	file := filepath.Join(other.Dir, "file")
	ctlMust(t, os.WriteFile(file, []byte("keep"), 0o600))
	for _, path := range []string{socket, file} {
		other.Args = []string{"--endpoint", "unix://" + path}
		ctlStartFails(t, other, "--endpoint", path)
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("%s is gone: %v", path, err)
		}
	}
}

// At its end the driver takes no new call, and finishes those in flight.
func TestACallInFlightIsFinishedWhenTheDriverEnds(t *testing.T) {
	s := ctlStalls(t, false)
	d := s.Driver
	v := d.Create("v", 16*ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	data := bytes.Repeat([]byte("what is to be copied\n"), 100_000)
	image := filepath.Join(s.pool, "volumes", "v", "data")
	ctlMust(t, os.WriteFile(image, data, 0o600))
	ctlMust(t, os.Truncate(image, 16*ctlMiB))
	thaw := ctlFrozen(t, s.mountPoint)
	result := s.begin(t, ctlCreates(d, "copy", harness.FromVolume(v)))

	process, err := os.FindProcess(d.Pid())
	ctlMust(t, err)
	ctlMust(t, process.Signal(syscall.SIGTERM))
	for end := time.Now().Add(20 * time.Second); !strings.Contains(d.Log(), "Shutting down"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the driver does not notice SIGTERM")
		}
	}
	time.Sleep(200 * time.Millisecond)
	if err := process.Signal(syscall.Signal(0)); err != nil {
		t.Fatalf("the driver ended with a call in flight: %v", err)
	}
	short, cancel := context.WithTimeout(d.Context(), 2*time.Second)
	defer cancel()
	if _, err := d.ListVolumes(short, &csi.ListVolumesRequest{}); err == nil {
		t.Error("the driver takes new calls while it ends")
	}
	thaw()
	ctlWant(t, "the call in flight", result(), codes.OK)
	d.Stop()
	d.Start()
	got, err := os.ReadFile(filepath.Join(s.pool, "volumes", "copy", "data"))
	ctlMust(t, err)
	if int64(len(got)) != 16*ctlMiB || !bytes.Equal(got[:len(data)], data) {
		t.Error("the copy is not one")
	}
}

// A driver that is told to end exits with 0 and says nothing that is wrong.
func TestTheDriverEndsInGoodOrder(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		d := harness.New(t, harness.FilePool("512Mi"))
		cmd := d.Command()
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		ctlMust(t, cmd.Start())
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if conn, err := net.Dial("unix", d.Socket); err == nil {
				ctlMust(t, conn.Close())
				break
			}
			if time.Now().After(end) {
				_ = cmd.Process.Kill()
				t.Fatalf("the driver does not listen")
			}
		}
		ctlMust(t, cmd.Process.Signal(signal)) // perhaps while it opens its pools
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", signal, err, log.String())
		}
		if strings.Contains(log.String(), "DATA RACE") {
			t.Errorf("%s: %s", signal, log.String())
		}
		if left, err := filepath.Glob(d.Socket + "*"); err != nil || len(left) > 0 {
			t.Errorf("%s left %v, %v", signal, left, err)
		}
	}
}

func TestTheJSONLogHasOneObjectInEachLine(t *testing.T) {
	d := harness.New(t, harness.FilePool("512Mi"))
	d.Args = []string{"--log-format", "json", "-v", "5"}
	d.Start()
	v := d.Create("v", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	_, err := d.DeleteVolume(d.Context(), &csi.DeleteVolumeRequest{VolumeId: v, Secrets: map[string]string{"password": "hunter2"}})
	ctlMust(t, err)
	_, err = d.CreateVolume(d.Context(), ctlRequest("evil\n{\"level\": \"forged\"}", ctlMode(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)))
	ctlWant(t, "a call that is refused", err, codes.InvalidArgument)
	d.Stop()
	var calls, refused int
	for line := range strings.Lines(d.Log()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("a line that is no object: %s", line)
			continue
		}
		if entry["level"] == "forged" {
			t.Errorf("a caller wrote this line: %s", line)
		}
		if entry["time"] == nil || entry["level"] == nil || entry["msg"] == nil {
			t.Errorf("a line without time, level or message: %s", line)
		}
		if entry["msg"] == "Call" {
			calls++
			if entry["code"] == "InvalidArgument" {
				refused++
			}
		}
	}
	if calls < 3 || refused != 1 {
		t.Errorf("%d calls are logged, %d as refused", calls, refused)
	}
	if strings.Contains(d.Log(), "hunter2") {
		t.Error("a secret is in the log")
	}
}

func TestTheMetricsTellWhatTheDriverKnows(t *testing.T) {
	d := harness.New(t, ctlTwoPools)
	address := ctlServesMetrics(t, d)
	d.Start()
	if got := ctlGet(t, address, "/healthz", http.StatusOK); got != "ok\n" {
		t.Errorf("/healthz: %q", got)
	}
	ctlGet(t, address, "/", http.StatusNotFound)
	block := harness.Block(harness.Writer)
	v := d.Create("v", 64*ctlMiB, block).GetVolumeId()
	d.Create("thick", 32*ctlMiB, block, harness.Parameters("provisioning", "thick"))
	f := ctlUse(t, d, "v", v)
	ctlFill(t, f, 8*ctlMiB, ctlMiB, 1)
	ctlMust(t, f.Close())
	d.Snapshot("s", v)
	far := d.Create("far", 16*ctlMiB, block, harness.Parameters("pool", "other")).GetVolumeId()
	_, err := d.CreateVolume(d.Context(), ctlRequest("refused", ctlRequired(100*ctlGiB)))
	ctlWant(t, "a call that is refused", err, codes.ResourceExhausted)

	image := filepath.Join(ctlFilePool(d, "other"), "volumes", "far", "data")
	ctlMust(t, os.Rename(image, image+".gone"))

	held := ctlBlocks(t, filepath.Join(ctlFilePool(d, "default"), "snapshots", "s", "data"))
	got := ctlMetrics(t, address)
	for name, want := range map[string]float64{
		`orlop_pool_volumes{pool="default"}`:         2,
		`orlop_pool_volumes{pool="other"}`:           1,
		`orlop_pool_snapshots{pool="default"}`:       1,
		`orlop_pool_snapshots{pool="other"}`:         0,
		`orlop_pool_damaged_volumes{pool="default"}`: 0,
		`orlop_pool_healthy{pool="default"}`:         1,
		`orlop_unhealthy_volumes`:                    1,
		fmt.Sprintf(`orlop_volume_condition{reason="ImageMissing",status="data_loss",volume=%q}`, far): 1,
		`orlop_pool_healthy{pool="other"}`:             1,
		`orlop_pool_provisioned_bytes{pool="default"}`: float64(96*ctlMiB + held),
		`orlop_pool_provisioned_bytes{pool="other"}`:   float64(16 * ctlMiB),
		`csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="/csi.v1.Controller/CreateVolume"}`:                3,
		`csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="ResourceExhausted",method_name="/csi.v1.Controller/CreateVolume"}`: 1,
		`csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="/csi.v1.Controller/CreateSnapshot"}`:              1,
		`csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="/csi.v1.Node/NodeStageVolume"}`:                   1,
	} {
		if value, told := got[name]; !told || value != want {
			t.Errorf("%s is %v (told: %v), want %v", name, value, told, want)
		}
	}
	for _, pool := range []string{"default", "other"} {
		metric := func(name string) int64 { return int64(got[fmt.Sprintf("orlop_pool_%s_bytes{pool=%q}", name, pool)]) }
		if room := ctlRoom(t, d, pool); metric("available")/4096*4096 != room {
			t.Errorf("pool %s: %d bytes are available, GetCapacity tells %d", pool, metric("available"), room)
		}
		if sum := metric("available") + metric("reserve") + metric("provisioned"); sum != metric("capacity") {
			t.Errorf("pool %s: available, reserve and provisioned are %d, the capacity %d", pool, sum, metric("capacity"))
		}
	}
	if used := int64(got[`orlop_pool_used_bytes{pool="default"}`]); used < 40*ctlMiB || used > 64*ctlMiB {
		t.Errorf("40 MiB were written and allocated, and %d bytes are in use", used)
	}
	page := ctlGet(t, address, "/metrics", http.StatusOK)
	elsewhere := []string{ // of a node that has a kubelet or a router, and of a router
		"orlop_kubelet_registered", "orlop_peer_certificate_expiration_timestamp_seconds", "orlop_orphans", "orlop_nodes",
	}
	for _, m := range driver.Metrics() {
		if slices.Contains(elsewhere, m.Name) {
			continue
		}
		if !strings.Contains(page, "# HELP "+m.Name+" ") || !strings.Contains(page, "# TYPE "+m.Name+" "+m.Type+"\n") {
			t.Errorf("%s is documented and not served", m.Name)
		}
	}
	for _, name := range []string{"process_resident_memory_bytes", "go_goroutines"} {
		if !strings.Contains(page, "\n"+name+" ") {
			t.Errorf("%s is not served", name)
		}
	}
	ctlMust(t, os.Rename(image+".gone", image))
	got = ctlMetrics(t, address)
	if got["orlop_unhealthy_volumes"] != 0 || strings.Contains(ctlGet(t, address, "/metrics", http.StatusOK), "orlop_volume_condition{") {
		t.Error("a condition stays when it is mended")
	}
	d.Stop()
	if _, err := net.DialTimeout("tcp", address, time.Second); err == nil {
		t.Error("the metrics are served after the end")
	}
}

func TestAnAddressForMetricsThatIsTakenStopsTheStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ctlMust(t, err)
	defer l.Close()
	d := harness.New(t, harness.FilePool("512Mi"))
	tree := ctlTree(t, d.Dir)
	d.Args = []string{"--metrics-address", l.Addr().String()}
	ctlStartFails(t, d, "--metrics-address", l.Addr().String())
	ctlSame(t, "the driver's directories", tree, ctlTree(t, d.Dir))
}

// The time of a snapshot is when it was cut, not when it was asked for or told
// of.
func TestASnapshotsTimeIsThatOfItsCut(t *testing.T) {
	d := harness.Start(t, harness.FilePool("512Mi"))
	v := d.Create("v", ctlMiB, harness.Block(harness.Writer)).GetVolumeId()
	before := timestamppb.Now().AsTime()
	at := d.Snapshot("s", v).GetCreationTime().AsTime()
	after := timestamppb.Now().AsTime()
	if at.Before(before) || at.After(after) {
		t.Errorf("cut at %s, asked for at %s and told at %s", at, before, after)
	}
}
