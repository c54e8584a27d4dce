package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The bounds of what is waited for.
const (
	callLimit  = time.Minute      // one CSI call
	startLimit = 30 * time.Second // from the start of the process until it serves
	stopLimit  = 30 * time.Second // from SIGTERM until it has ended
)

// driver is one csi-driver process after the other, on one pool, and a client
// of it.
type driver struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	binary, dir string
	log         logBuffer
	conn        *grpc.ClientConn
	process     *exec.Cmd
	ended       chan struct{} // closed when the process has ended
	outcome     error         // of the process, once it has ended
}

func newDriver(binary, dir string) *driver { return &driver{binary: binary, dir: dir} }

// image is the file that the pool is in.
func (d *driver) image() string { return filepath.Join(d.dir, "pool.img") }

// configure writes the configuration, with one pool in one sparse file.
func (d *driver) configure(poolSize int64) error {
	text := fmt.Sprintf("pools:\n- name: default\n  source:\n    file: {path: %q, size: %d, sparse: true}\n", d.image(), poolSize)
	return os.WriteFile(filepath.Join(d.dir, "config.yaml"), []byte(text), 0o600)
}

// start starts the process and waits until it serves.
func (d *driver) start(ctx context.Context) error {
	socket := "unix://" + filepath.Join(d.dir, "csi.sock")
	d.process = exec.Command(d.binary, "standalone", //nolint:noctx // it is ended with a signal, that it may finish
		"--endpoint", socket,
		"--node-id", "demo",
		"--config", filepath.Join(d.dir, "config.yaml"),
		"--state-dir", filepath.Join(d.dir, "state"),
		"--metrics-address", "")
	d.process.Stderr = &d.log
	d.process.WaitDelay = time.Second                           // should a child of it go on holding that
	d.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is ours to act on
	if err := d.process.Start(); err != nil {
		return err
	}
	d.ended = make(chan struct{})
	go func() {
		d.outcome = d.process.Wait()
		close(d.ended)
	}()
	conn, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(bounded))
	if err != nil {
		return err
	}
	d.conn = conn
	d.IdentityClient, d.ControllerClient, d.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	return d.ready(ctx)
}

// bounded gives every call its limit and every error the call's name.
func bounded(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if err := invoke(ctx, method, request, reply, conn, options...); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(method), err)
	}
	return nil
}

func (d *driver) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		response, err := d.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && response.GetReady().GetValue() {
			return nil
		}
		select {
		case <-d.ended:
			return errors.New("csi-driver did not start")
		case <-ctx.Done():
			return fmt.Errorf("csi-driver does not serve: %w", err)
		case <-time.After(2 * time.Millisecond):
			d.conn.ResetConnectBackoff()
		}
	}
}

// gone tells how the process ended, if it did so by itself.
func (d *driver) gone() (outcome string, ok bool) {
	if d.process == nil || d.ended == nil {
		return "", false
	}
	select {
	case <-d.ended:
		return d.process.ProcessState.String(), true
	default:
		return "", false
	}
}

// stop ends the process as the system does.
func (d *driver) stop() error {
	if err := d.end(syscall.SIGTERM); err != nil {
		return fmt.Errorf("csi-driver, told to stop: %w", err)
	}
	return d.outcome
}

// kill ends the process as a crash does.
func (d *driver) kill() error { return d.end(syscall.SIGKILL) }

// end sends a signal and waits until the process has ended; if that takes too
// long, it is killed. A process that is not there is fine.
func (d *driver) end(signal syscall.Signal) error {
	if d.process == nil || d.process.Process == nil {
		return nil
	}
	defer func() { d.process, d.ended = nil, nil }()
	if d.conn != nil {
		d.conn.Close()
	}
	_ = d.process.Process.Signal(signal) // it may have ended by itself
	select {
	case <-d.ended:
		return nil
	case <-time.After(stopLimit):
		_ = d.process.Process.Kill()
		<-d.ended
		return fmt.Errorf("it had not ended after %s, and was killed", stopLimit)
	}
}

// volume is one volume and where it is in use.
type volume struct {
	name       string
	id         string
	size       int64 // bytes
	capability *csi.VolumeCapability
}

func (d *driver) target(v *volume) string  { return filepath.Join(d.dir, "targets", v.name) }
func (d *driver) staging(v *volume) string { return filepath.Join(d.dir, "staging", v.name) }

// accessMode allows more than one publication on one node, so that one of them
// can be read-only.
var accessMode = &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER}

// mounted is the use of a volume through a filesystem.
func mounted(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
		AccessMode: accessMode,
	}
}

// raw is the use of a volume as a block device.
func raw() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: accessMode,
	}
}

// fromVolume and fromSnapshot are what a volume can be made from.
func fromVolume(v *volume) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id},
	}}
}

func fromSnapshot(s *csi.Snapshot) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.GetSnapshotId()},
	}}
}

// create makes a volume; source may be nil.
func (d *driver) create(ctx context.Context, name string, size int64, c *csi.VolumeCapability, source *csi.VolumeContentSource) (*volume, error) {
	response, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name:                name,
		CapacityRange:       &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities:  []*csi.VolumeCapability{c},
		VolumeContentSource: source,
	})
	if err != nil {
		return nil, err
	}
	v := &volume{name: name, id: response.GetVolume().GetVolumeId(), size: response.GetVolume().GetCapacityBytes(), capability: c}
	if v.size < size {
		return nil, fmt.Errorf("volume %s has %d bytes, less than the %d asked for", name, v.size, size)
	}
	return v, nil
}

// use stages and publishes volumes.
func (d *driver) use(ctx context.Context, volumes ...*volume) error {
	for _, v := range volumes {
		if err := os.MkdirAll(d.staging(v), 0o750); err != nil { // the orchestrator's part
			return err
		}
		if _, err := d.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: d.staging(v), VolumeCapability: v.capability,
		}); err != nil {
			return err
		}
		if err := d.publish(ctx, v, d.target(v), false); err != nil {
			return err
		}
	}
	return nil
}

func (d *driver) publish(ctx context.Context, v *volume, target string, readOnly bool) error {
	_, err := d.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: d.staging(v), TargetPath: target, VolumeCapability: v.capability, Readonly: readOnly,
	})
	return err
}

func (d *driver) unpublish(ctx context.Context, v *volume, target string) error {
	_, err := d.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: target})
	return err
}

// release undoes use.
func (d *driver) release(ctx context.Context, v *volume) error {
	if err := d.unpublish(ctx, v, d.target(v)); err != nil {
		return err
	}
	if _, err := d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: d.staging(v)}); err != nil {
		return err
	}
	return os.Remove(d.staging(v)) // the orchestrator's part; it must be empty
}

// grow makes a volume in use larger, on both sides.
func (d *driver) grow(ctx context.Context, v *volume, size int64) error {
	response, err := d.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: v.capability,
	})
	if err != nil {
		return err
	}
	if response.GetNodeExpansionRequired() {
		if _, err := d.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: d.target(v), StagingTargetPath: d.staging(v), VolumeCapability: v.capability,
			CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		}); err != nil {
			return err
		}
	}
	v.size = response.GetCapacityBytes()
	if v.size < size {
		return fmt.Errorf("volume %s grew to %d bytes, less than the %d asked for", v.name, v.size, size)
	}
	return nil
}

// listVolumes gives the names of all volumes by ID, page by page.
func (d *driver) listVolumes(ctx context.Context) (map[string]bool, error) {
	ids := map[string]bool{}
	for token := ""; ; {
		response, err := d.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 2, StartingToken: token})
		if err != nil {
			return nil, err
		}
		for _, entry := range response.GetEntries() {
			ids[entry.GetVolume().GetVolumeId()] = true
		}
		if token = response.GetNextToken(); token == "" {
			return ids, nil
		}
	}
}

// available is what the pool can promise to a new volume, in bytes.
func (d *driver) available(ctx context.Context) (int64, error) {
	response, err := d.GetCapacity(ctx, &csi.GetCapacityRequest{})
	return response.GetAvailableCapacity(), err
}

// logBuffer keeps what the driver logs. Its zero value is ready.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
	also io.Writer // nil, or where it goes too
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.also != nil {
		_, _ = l.also.Write(p) // whoever read it may have left
	}
	return l.text.Write(p)
}

// tail gives the last lines.
func (l *logBuffer) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(l.text.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
