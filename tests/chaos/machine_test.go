//go:build integration

package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/tests/harness"
)

// machine is a driver with a pool, and where its volumes are used.
type machine struct {
	*harness.Driver

	node nodeClients
	pool string // the pool's directory
	room int64  // bytes that the pool can promise when it is empty
}

// nodeClients are those of a node, which outlive its driver.
type nodeClients struct {
	csi.NodeClient
	controller clients
}

// reach makes clients of a socket. Whoever listens there next, they find soon.
func reach(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	soon := backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func newMachine(t *testing.T, d *harness.Driver) *machine {
	t.Helper()
	conn := reach(t, d.Socket)
	m := &machine{
		Driver: d, pool: filepath.Join(d.Dir, "state", "mounts", "default"),
		node: nodeClients{csi.NewNodeClient(conn), clients{csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn)}},
	}
	room, err := m.available(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.room = room
	return m
}

// reached waits until the clients reach a driver that was started again.
func (m *machine) reached() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, _ = m.node.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{}, grpc.WaitForReady(true)) // what comes next tells
}

func (m *machine) staging(volume string) string { return filepath.Join(m.Dir, "staging", volume) }

func (m *machine) target(volume string) string { return m.Target(volume) }

// available asks how much can be promised.
func (m *machine) available(ctx context.Context) (int64, error) {
	response, err := m.node.controller.GetCapacity(ctx, &csi.GetCapacityRequest{})
	return response.GetAvailableCapacity(), err
}

// thaw lets everything go on that a failed test has left frozen. What was unmounted
// when it was frozen is so still, and keeps its device: it has to be mounted again
// for that.
func (m *machine) thaw(t *testing.T) {
	mounts, err := filesystem.Mounts()
	if err != nil {
		t.Log(err)
		return
	}
	mounted := map[string]bool{}
	for _, mount := range mounts {
		if rel, err := filepath.Rel(m.Dir, mount.Path); err == nil && filepath.IsLocal(rel) {
			mounted[mount.Source] = true
			_, _ = filesystem.Thaw(mount.Path)
		}
	}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	dir := t.TempDir()
	for _, file := range files {
		backing, err := os.ReadFile(file)
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(file))))
		if err != nil || !strings.HasPrefix(string(backing), m.pool+"/") || mounted[device] {
			continue
		}
		for kind, options := range map[string]string{"ext4": "", "xfs": "nouuid", "btrfs": ""} {
			if unix.Mount(device, dir, kind, 0, options) == nil {
				_, _ = filesystem.Thaw(dir)
				if err := unix.Unmount(dir, 0); err != nil {
					t.Log(err)
				}
			}
		}
	}
}

// alone is one machine with one driver, which an orchestrator calls.
type alone struct{ m *machine }

// poolSize is the size of a pool, of which little is ever used.
const (
	poolSize = "24Gi"
	poolRoom = int64(12) << 30 // bytes that are planned to be promised at most
)

func startAlone(t *testing.T) *alone {
	t.Helper()
	return &alone{newMachine(t, harness.Start(t, harness.FilePool(poolSize)))}
}

func (a *alone) client() clients   { return a.m.node.controller }
func (a *alone) nodes() []*machine { return []*machine{a.m} }
func (a *alone) quiet() bool       { return true }
func (a *alone) strikes() []string { return []string{"kill", "kill", "kill", "kill", "stop"} }
func (a *alone) strike(s strike) func() {
	switch s.What {
	case "kill":
		a.m.Kill()
	case "stop":
		a.m.Stop()
	default:
		panic(fmt.Sprintf("nobody knows how to %s", s.What))
	}
	return func() {
		a.m.Start()
		a.m.reached()
	}
}
