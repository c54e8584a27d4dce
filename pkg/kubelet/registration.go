// Package kubelet makes the driver known to the kubelet of its node, through
// the registration API for plugins (k8s.io/kubelet/pkg/apis/pluginregistration/v1):
// a socket in a directory that the kubelet watches, on which the kubelet asks
// what the plugin is, and tells whether it accepts it.
//
// It calls nobody, serves no CSI, and touches nothing in the directory but its
// own socket.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Registration is a driver's standing offer to the kubelet.
type Registration struct {
	registration.UnimplementedRegistrationServer

	// Directory is the one that the kubelet watches, usually
	// /var/lib/kubelet/plugins_registry. It must be there.
	Directory string
	// Driver is the CSI driver's name.
	Driver string
	// Endpoint is the path of the CSI socket, as the kubelet sees it.
	Endpoint string
	// Versions are those of CSI that the driver speaks, such as 1.13.0.
	Versions []string
	// Told is called with each answer of the kubelet; err is nil when it has
	// accepted the driver. It may be nil.
	Told func(err error)

	mu       sync.Mutex
	accepted bool
	refusal  error
}

// Socket is the path of the registration's own socket.
func (r *Registration) Socket() string {
	return filepath.Join(r.Directory, r.Driver+"-reg.sock")
}

// Accepted reports whether the kubelet has accepted the driver.
func (r *Registration) Accepted() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accepted
}

// Refusal is why the kubelet does not accept the driver; nil if it does, or has
// not answered yet.
func (r *Registration) Refusal() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refusal
}

// Pending is that the kubelet has not accepted the driver yet; nil if it has.
func (r *Registration) Pending() error {
	if r.Accepted() {
		return nil
	}
	return errors.New("the kubelet has not registered the driver yet")
}

// Serve makes the offer until ctx is done, and then withdraws it. The kubelet
// finds the socket by itself when it restarts. A socket that is taken away is
// made anew, for the kubelet takes that for the end of the plugin; without the
// directory there is no way to the kubelet, which is an error.
func (r *Registration) Serve(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching %s: %w", r.Directory, err)
	}
	defer watcher.Close()
	if err := watcher.Add(r.Directory); err != nil { // before the socket is there, so that no removal is missed
		return fmt.Errorf("watching %s: %w", r.Directory, err)
	}
	for ctx.Err() == nil {
		if err := r.offer(ctx, watcher); err != nil {
			return err
		}
	}
	return nil
}

// offer serves on the socket until it is taken away or ctx is done.
func (r *Registration) offer(ctx context.Context, watcher *fsnotify.Watcher) error {
	listener, err := listen(ctx, r.Socket())
	if err != nil {
		return err
	}
	made, err := os.Lstat(r.Socket())
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, r)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	defer func() {
		if r.there(made) {
			os.Remove(r.Socket())
		}
		server.Stop()
		r.told(false, nil)
	}()
	for r.there(made) {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			return fmt.Errorf("serving at %s: %w", r.Socket(), err)
		case err := <-watcher.Errors: // such as that events were dropped; look
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("watching %s: %w", r.Directory, err)
			}
		case e := <-watcher.Events:
			if e.Name == r.Directory && e.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("the directory %s is gone, and with it the way to the kubelet", r.Directory)
			}
		}
	}
	return nil
}

// there reports whether the socket's file is the one that was made.
func (r *Registration) there(made fs.FileInfo) bool {
	now, err := os.Lstat(r.Socket())
	return err == nil && os.SameFile(made, now)
}

// listen makes a socket that this user alone can use. One that is there is that
// of a driver that died: two at once are kept apart by the lock of their CSI
// socket.
func listen(ctx context.Context, path string) (net.Listener, error) {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s exists and is not a socket; it was left alone", path)
	default:
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error // before bind(2) makes the file
		return errors.Join(c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }), chmod)
	}}
	listener, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if l, ok := listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false) // it may be another's by then
	}
	return listener, nil
}

// GetInfo implements the registration API: the kubelet asks what the plugin is.
func (r *Registration) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              r.Driver,
		Endpoint:          r.Endpoint,
		SupportedVersions: r.Versions,
	}, nil
}

// NotifyRegistrationStatus implements the registration API: the kubelet tells
// whether it accepts the plugin. One that it refuses it asks again, with growing
// delays.
func (r *Registration) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	var refusal error
	if !status.GetPluginRegistered() {
		refusal = fmt.Errorf("the kubelet refuses the driver: %s", status.GetError())
	}
	r.told(status.GetPluginRegistered(), refusal)
	if r.Told != nil {
		r.Told(refusal)
	}
	return &registration.RegistrationStatusResponse{}, nil
}

func (r *Registration) told(accepted bool, refusal error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.accepted, r.refusal = accepted, refusal
}
