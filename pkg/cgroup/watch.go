package cgroup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// watcher gives cgroups of version 1 that are made in others the limits of
// those, as they are made (inotify(7)).
type watcher struct {
	inotify *os.File
	report  func(error)
	ended   chan struct{}
	work    sync.WaitGroup

	mu   sync.Mutex
	dirs map[int32]watched // by watch descriptor
}

// watched is a cgroup and what is told of those in it.
type watched struct {
	dir    string
	events uint32
}

func newWatcher(report func(error)) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify_init1: %w", err)
	}
	w := &watcher{
		inotify: os.NewFile(uintptr(fd), "inotify"),
		report:  report,
		ended:   make(chan struct{}),
		dirs:    map[int32]watched{},
	}
	go w.run()
	return w, nil
}

func (w *watcher) close() error {
	err := w.inotify.Close()
	<-w.ended
	w.work.Wait()
	return err
}

// add watches a cgroup and all in it. It is no harm to add one twice.
func (w *watcher) add(dir string) error {
	// The end of a cgroup is told to who watches the one above. To its own
	// watch the kernel tells nothing, and keeps that for ever.
	if err := w.addOne(filepath.Dir(dir), unix.IN_DELETE); err != nil {
		return err
	}
	return walk(dir, func(path string) error {
		return w.addOne(path, unix.IN_CREATE|unix.IN_DELETE)
	})
}

func (w *watcher) addOne(dir string, events uint32) error {
	// With the lock, so that an event finds its directory.
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.control(func(fd int) error {
		wd, err := unix.InotifyAddWatch(fd, dir, events|unix.IN_ONLYDIR)
		if err != nil {
			return fmt.Errorf("inotify_add_watch %s: %w", dir, err)
		}
		w.dirs[int32(wd)] = watched{dir, events}
		return nil
	})
}

// forget ends the watches of a cgroup that is gone, and of all that were in it.
// It is called with the lock held.
func (w *watcher) forget(dir string) error {
	return w.control(func(fd int) error {
		var errs []error
		for wd, at := range w.dirs {
			if at.dir != dir && !strings.HasPrefix(at.dir, dir+"/") {
				continue
			}
			delete(w.dirs, wd)
			if _, err := unix.InotifyRmWatch(fd, uint32(wd)); err != nil && !errors.Is(err, unix.EINVAL) { // gone
				errs = append(errs, fmt.Errorf("inotify_rm_watch %s: %w", at.dir, err))
			}
		}
		return errors.Join(errs...)
	})
}

func (w *watcher) control(do func(fd int) error) error {
	raw, err := w.inotify.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := raw.Control(func(fd uintptr) { doErr = do(int(fd)) }); err != nil {
		// It fails for a closed file alone, and says so with an error of
		// internal/poll that is not os.ErrClosed.
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	return doErr
}

// run reads events until the watcher is closed.
func (w *watcher) run() {
	defer close(w.ended)
	buffer := make([]byte, 64<<10)
	for {
		n, err := w.inotify.Read(buffer)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			w.tell(fmt.Errorf("watching for new containers: %w", err))
			return
		}
		for events := buffer[:n]; len(events) >= unix.SizeofInotifyEvent; {
			var event unix.InotifyEvent
			event.Wd = int32(binary.NativeEndian.Uint32(events[0:]))
			event.Mask = binary.NativeEndian.Uint32(events[4:])
			event.Len = binary.NativeEndian.Uint32(events[12:])
			end := unix.SizeofInotifyEvent + int(event.Len)
			name, _, _ := bytes.Cut(events[unix.SizeofInotifyEvent:end], []byte{0})
			events = events[end:]
			w.handle(event, string(name))
		}
	}
}

func (w *watcher) handle(event unix.InotifyEvent, name string) {
	if event.Mask&unix.IN_Q_OVERFLOW != 0 {
		w.work.Go(w.catchUp)
		return
	}
	w.mu.Lock()
	dir := w.dirs[event.Wd].dir
	path := filepath.Join(dir, name)
	var err error
	if dir != "" && event.Mask&unix.IN_DELETE != 0 {
		err = w.forget(path)
	}
	w.mu.Unlock()
	w.tell(err)
	if dir == "" || event.Mask&unix.IN_CREATE == 0 || event.Mask&unix.IN_ISDIR == 0 {
		return
	}
	// Setting a limit can wait for the device, and a device for its disk.
	w.work.Go(func() {
		w.tell(w.pass(path))
	})
}

// tell reports what is worth it.
func (w *watcher) tell(err error) {
	if err != nil && !isGone(err) && !errors.Is(err, os.ErrClosed) {
		w.report(err)
	}
}

// pass gives a cgroup the limits of the one above it, and likewise all in it.
// One that is made in it meanwhile is seen by its watch.
func (w *watcher) pass(dir string) error {
	return walk(dir, func(path string) error {
		if err := w.addOne(path, unix.IN_CREATE|unix.IN_DELETE); err != nil {
			return err
		}
		return inherit(path)
	})
}

// catchUp looks at all that is watched, after the kernel had too many events to
// tell them.
func (w *watcher) catchUp() {
	w.mu.Lock()
	all := maps.Clone(w.dirs)
	w.mu.Unlock()
	for _, at := range all {
		entries, err := os.ReadDir(at.dir)
		if isGone(err) {
			w.mu.Lock()
			err = w.forget(at.dir)
			w.mu.Unlock()
		}
		w.tell(err)
		for _, entry := range entries {
			if !entry.IsDir() || at.events&unix.IN_CREATE == 0 {
				continue
			}
			w.tell(w.pass(filepath.Join(at.dir, entry.Name())))
		}
	}
}
