package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the size of sockaddr_un.sun_path without its final NUL, in
// bytes (unix(7)).
const maxSocketPath = 107

// socketPath takes the path out of an endpoint such as
// unix:///run/orlop/csi.sock.
func socketPath(endpoint string) (string, error) {
	path, found := strings.CutPrefix(endpoint, "unix://")
	switch {
	case !found || !filepath.IsAbs(path) || strings.HasSuffix(path, "/"):
		return "", fmt.Errorf("%q is not of the form unix:///absolute/path/to/csi.sock", endpoint)
	case strings.ContainsRune(path, 0):
		return "", fmt.Errorf("%q holds a NUL", endpoint)
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("the path of %s has %d bytes; sockets can have %d", endpoint, len(path), maxSocketPath)
	}
	return filepath.Clean(path), nil
}

// socket is a listening unix socket with the file that it is found by, which
// goes away when the socket is closed.
type socket struct {
	net.Listener
	path  string
	file  fs.FileInfo // to know our file from one that took its place
	lock  *os.File    // held for as long as the socket is ours
	close func() error
}

// listenAt makes the socket of an endpoint, usable by this user alone. It
// replaces what a driver that died left there, and refuses if anything listens
// there, or if there is a file that is not a socket.
//
// Between two drivers a lock decides: a file beside the socket, which also goes
// away at the end.
func listenAt(ctx context.Context, endpoint string) (_ *socket, err error) {
	s := &socket{}
	s.close = sync.OnceValue(s.closeOnce)
	if s.path, err = socketPath(endpoint); err != nil {
		return nil, err
	}
	if s.lock, err = lockFile(s.path + ".lock"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unlockFile(s.lock)
		}
	}()
	if err := removeStale(s.path); err != nil {
		return nil, err
	}
	// The mode that the socket has before bind(2) is the one its file gets, so
	// that at no time another user can connect.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		return errors.Join(c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }), chmod)
	}}
	listener, err := config.Listen(ctx, "unix", s.path)
	if err != nil {
		return nil, err
	}
	if l, ok := listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false) // Close does it, with care
	}
	s.Listener = listener
	if s.file, err = os.Lstat(s.path); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return s, nil
}

// Close stops listening and removes the socket's file, unless it is no longer
// ours.
func (s *socket) Close() error { return s.close() }

func (s *socket) closeOnce() error {
	defer unlockFile(s.lock)
	var removed error
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(s.file, now) {
		removed = os.Remove(s.path)
	}
	return errors.Join(removed, s.Listener.Close())
}

// removeStale makes way for a socket at path. Only a socket that refuses to be
// connected to, because nobody listens, is removed.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket; it was left alone", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(fmt.Errorf("another process serves at %s", path), conn.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s exists, and whether another process serves there is unknown: %w", path, err)
	}
	return os.Remove(path)
}

// lockFile takes the lock of a file that it makes where there is none. It never
// waits.
func lockFile(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the directory %s does not exist; make it first", filepath.Dir(path))
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("another process holds %s", path)
			}
			return nil, fmt.Errorf("flock %s: %w", path, err)
		}
		// Whoever held it before may have removed the file meanwhile.
		locked, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if now, err := os.Lstat(path); err == nil && os.SameFile(locked, now) {
			return f, nil
		}
		f.Close()
	}
}

// unlockFile removes the file, while its lock is still held, and gives the lock
// up.
func unlockFile(f *os.File) {
	os.Remove(f.Name())
	f.Close()
}
