//go:build integration

package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// network is a network namespace of its own.
type network struct {
	t    *testing.T
	path string
	do   chan func()
}

// newNetwork makes one. It lasts as long as a thread that is in it.
func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{t: t, do: make(chan func())}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and ends with it
		err := unix.Unshare(unix.CLONE_NEWNET)
		n.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		made <- err
		for f := range n.do {
			f()
		}
	}()
	if err := <-made; err != nil {
		t.Fatalf("a network namespace: %v", err)
	}
	t.Cleanup(func() { close(n.do) })
	return n
}

// in runs something in the namespace.
func (n *network) in(f func()) {
	done := make(chan struct{})
	n.do <- func() {
		defer close(done)
		f()
	}
	<-done
}

// ip runs the command of that name in the namespace.
func (n *network) ip(arguments string) {
	n.t.Helper()
	var out []byte
	var err error
	n.in(func() { out, err = exec.Command("ip", strings.Fields(arguments)...).CombinedOutput() })
	if err != nil {
		n.t.Fatalf("ip %s: %v\n%s", arguments, err, out)
	}
}

// A machine that loses its power or its cable closes no connection. The calls
// that wait for it end all the same, in seconds, and so does the next one; when
// it is back, it is found.
func TestANodeThatVanishesFromTheNetworkIsUnavailableWithinSeconds(t *testing.T) {
	here, there := newNetwork(t), newNetwork(t)
	here.ip("link add cable type veth peer name cable netns " + there.path)
	here.ip("address add 192.0.2.1/30 dev cable")
	there.ip("address add 192.0.2.2/30 dev cable")
	here.ip("link set cable up")
	there.ip("link set cable up")
	soon(t, "the cable is up", func() bool {
		var err error
		here.in(func() { err = exec.Command("ip", "-4", "route", "get", "192.0.2.2").Run() })
		return err == nil
	})

	dialled := dialOptions
	defer func() { dialOptions = dialled }()
	dialOptions = append(slices.Clip(dialOptions), grpc.WithContextDialer(func(ctx context.Context, address string) (c net.Conn, err error) {
		var d net.Dialer
		if !strings.HasPrefix(address, "192.0.2.") {
			return d.DialContext(ctx, "tcp", address)
		}
		ended := make(chan struct{})
		go func() { // a thread of its own: several may wait at once
			defer close(ended)
			runtime.LockOSThread()
			space, openErr := os.Open(here.path)
			if openErr != nil {
				err = openErr
				return
			}
			defer space.Close()
			if err = unix.Setns(int(space.Fd()), unix.CLONE_NEWNET); err == nil {
				c, err = d.DialContext(ctx, "tcp4", address)
			}
		}()
		<-ended
		return c, err
	}))

	s, d, nodes := startFleet(t, 2*gib, 2*gib)
	far := &testNode{memory: nodes[0].memory}
	far.serve(t, "node-1", nodes[0].memory)
	var l net.Listener
	var err error
	there.in(func() { l, err = net.Listen("tcp4", "192.0.2.2:9810") })
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = far.server.Serve(l) }() // until it is stopped
	d.Set(Node{Segment: "node-1", Address: "192.0.2.2:9810"}, nodes[1].Node)
	id := made(t, s, volume("v", among("node-1")))

	arrived := make(chan struct{}, 1)
	far.Before(func(ctx context.Context, method string) error {
		if method != "CreateVolume" {
			return nil
		}
		arrived <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	waiting := make(chan error, 1)
	go func() {
		_, err := s.CreateVolume(context.Background(), volume("w", among("node-1")))
		waiting <- err
	}()
	<-arrived
	there.ip("link set cable down")
	cut := time.Now()
	const seconds = 45 * time.Second // of a machine that may have a lot to do; else it takes about 5

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	_, err = s.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	wantCode(t, "a call to a node that has vanished", err, codes.Unavailable)
	t.Logf("a call ends after %s", time.Since(cut).Round(time.Millisecond))
	select {
	case err := <-waiting:
		wantCode(t, "a call that waits for one", err, codes.Unavailable)
		t.Logf("one that waits after %s", time.Since(cut).Round(time.Millisecond))
	case <-time.After(seconds):
		t.Fatal("a call that waits for a node that has vanished does not end")
	}
	if took := time.Since(cut); took > seconds {
		t.Errorf("it took %s", took)
	}
	_, err = s.ListVolumes(ctx, &csi.ListVolumesRequest{})
	wantCode(t, "a list", err, codes.Unavailable)
	if err == nil || !strings.Contains(err.Error(), "node-1") {
		t.Errorf("%v does not name the node", err)
	}
	if _, err := s.CreateVolume(ctx, volume("elsewhere", among("node-2"))); err != nil {
		t.Errorf("a node that is there: %v", err)
	}

	far.Before(func(context.Context, string) error { return nil })
	there.ip("link set cable up")
	soon(t, "the node is found again", func() bool {
		_, err := s.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
		return err == nil
	})
	if _, err := far.Volume("v"); err == nil {
		t.Error("the volume is not deleted")
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Error("it took too long")
	}
}
