package kubelet_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/orlop-csi/orlop/pkg/kubelet"
)

const soon = 30 * time.Second

// offered starts a registration in a directory of its own and gives it with how
// it ends.
func offered(t *testing.T) (*kubelet.Registration, func() error) {
	t.Helper()
	r := prepared(t)
	return r, start(t, r)
}

// prepared gives a registration in a directory of its own.
func prepared(t *testing.T) *kubelet.Registration {
	t.Helper()
	dir, err := os.MkdirTemp("", "orlop-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &kubelet.Registration{Directory: dir, Driver: "csi.orlop.dev", Endpoint: "/somewhere/csi.sock", Versions: []string{"1.13.0"}}
}

func start(t *testing.T, r *kubelet.Registration) (end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ctx) }()
	end = func() error {
		cancel()
		select {
		case err := <-ended:
			ended <- err
			return err
		case <-time.After(soon):
			t.Fatal("it does not end")
			return nil
		}
	}
	t.Cleanup(func() { _ = end() })
	return end
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after %s: %s", soon, what)
		}
	}
}

// watchOnce does what the kubelet's plugin watcher does when it finds a socket:
// it asks what the plugin is and answers with a status.
func watchOnce(t *testing.T, r *kubelet.Registration, answer *registration.RegistrationStatus) *registration.PluginInfo {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+r.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := registration.NewRegistrationClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	info, err := client.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.NotifyRegistrationStatus(ctx, answer); err != nil {
		t.Fatal(err)
	}
	return info
}

func TestTheKubeletLearnsWhatTheDriverIs(t *testing.T) {
	r, end := offered(t)
	if r.Accepted() || r.Refusal() != nil {
		t.Error("it has an answer before the kubelet gave one")
	}
	info := watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})
	if info.GetType() != "CSIPlugin" || info.GetName() != r.Driver || info.GetEndpoint() != r.Endpoint || !slices.Equal(info.GetSupportedVersions(), r.Versions) {
		t.Errorf("the kubelet is told %v", info)
	}
	if !r.Accepted() || r.Refusal() != nil {
		t.Errorf("accepted %v, refusal %v", r.Accepted(), r.Refusal())
	}
	if info, err := os.Stat(r.Socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; only root may use the socket", info, err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(r.Socket()); !os.IsNotExist(err) {
		t.Errorf("the socket is left (%v)", err)
	}
	if r.Accepted() {
		t.Error("it counts as accepted after its end")
	}
}

func TestARefusalIsToldWithTheKubeletsReason(t *testing.T) {
	r, _ := offered(t)
	watchOnce(t, r, &registration.RegistrationStatus{Error: "there is another of that name"})
	if r.Accepted() || r.Refusal() == nil || !strings.Contains(r.Refusal().Error(), "there is another of that name") {
		t.Errorf("accepted %v, refusal %v", r.Accepted(), r.Refusal())
	}
	// The kubelet tries again by and by.
	watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})
	if !r.Accepted() || r.Refusal() != nil {
		t.Errorf("accepted %v, refusal %v", r.Accepted(), r.Refusal())
	}
}

func TestASocketThatIsTakenAwayIsMadeAnew(t *testing.T) {
	for name, take := range map[string]func(string) error{
		"removed": os.Remove,
		"renamed": func(path string) error { return os.Rename(path, path+".old") },
		"replaced": func(path string) error {
			other := path + ".other"
			l, err := net.Listen("unix", other)
			if err != nil {
				return err
			}
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			l.Close()
			return os.Rename(other, path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := offered(t)
			watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})
			before, err := os.Lstat(r.Socket())
			if err != nil {
				t.Fatal(err)
			}
			if err := take(r.Socket()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "another socket is there", func() bool {
				now, err := os.Lstat(r.Socket())
				return err == nil && (!os.SameFile(before, now) || now.ModTime() != before.ModTime()) && !r.Accepted()
			})
			watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})
			if !r.Accepted() {
				t.Error("it is not accepted again")
			}
		})
	}
}

func TestWhatADeadDriverLeftIsReplacedAndNothingElse(t *testing.T) {
	dir, err := os.MkdirTemp("", "orlop-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	r := &kubelet.Registration{Directory: dir, Driver: "csi.orlop.dev"}
	l, err := net.Listen("unix", r.Socket())
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	start(t, r)
	watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})

	file := &kubelet.Registration{Directory: dir, Driver: "other"}
	if err := os.WriteFile(file.Socket(), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := file.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("on a file: %v", err)
	}
	if content, err := os.ReadFile(file.Socket()); err != nil || string(content) != "precious" {
		t.Errorf("the file is %q (%v)", content, err)
	}
}

func TestWithoutItsDirectoryThereIsNoRegistration(t *testing.T) {
	r := prepared(t)
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(t.Context()) }()
	watchOnce(t, r, &registration.RegistrationStatus{PluginRegistered: true})
	// While it is removed the socket may be offered in it once more.
	eventually(t, "removed", func() bool { return os.RemoveAll(r.Directory) == nil })
	select {
	case err := <-ended: // by itself
		if err == nil || !strings.Contains(err.Error(), r.Directory) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(soon):
		t.Fatal("it does not end")
	}
	if r.Accepted() {
		t.Error("it is accepted still")
	}
	none := &kubelet.Registration{Directory: filepath.Join(r.Directory, "none"), Driver: "csi.orlop.dev"}
	if err := none.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), none.Directory) {
		t.Errorf("without a directory: %v", err)
	}
}
