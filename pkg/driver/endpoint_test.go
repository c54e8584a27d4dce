package driver

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// shortDir gives a directory whose path leaves room for a socket's name;
// t.TempDir has the test's name in it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "orlop-") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// abandonSocket leaves a socket behind that nobody listens at, as a driver does
// that is killed.
func abandonSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func mustListen(t *testing.T, path string) *socket {
	t.Helper()
	s, err := listenAt(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustServe(t *testing.T, path string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("nobody serves: %v", err)
	}
	c.Close()
}

func TestAnEndpointIsAnAbsolutePathOfAUnixSocket(t *testing.T) {
	for endpoint, want := range map[string]string{
		"unix:///run/orlop/csi.sock":          "/run/orlop/csi.sock",
		"unix:///run//orlop/./csi.sock":       "/run/orlop/csi.sock",
		"unix:///" + strings.Repeat("x", 106): "/" + strings.Repeat("x", 106),
	} {
		if got, err := socketPath(endpoint); err != nil || got != want {
			t.Errorf("%s is at %q (error %v), want %q", endpoint, got, err, want)
		}
	}
	for _, endpoint := range []string{
		"", "/run/csi.sock", "unix:/run/csi.sock", "unix://run/csi.sock", "unix:///", "unix:///run/",
		"tcp://127.0.0.1:10000", "unix:///a\x00b", "unix:///" + strings.Repeat("x", 107),
	} {
		if path, err := socketPath(endpoint); err == nil {
			t.Errorf("%q is accepted as %q", endpoint, path)
		}
	}
}

func TestOnlyTheDriversUserCanConnect(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	old := unix.Umask(0)
	defer unix.Umask(old)
	mustListen(t, path)
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket's mode is %s", info.Mode())
	}
}

func TestStoppingLeavesNothingBehind(t *testing.T) {
	dir := shortDir(t)
	s := mustListen(t, filepath.Join(dir, "csi.sock"))
	mustServe(t, s.path)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("%v is left", left)
	}
}

func TestAStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	abandonSocket(t, path)
	if err := os.WriteFile(path+".lock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mustListen(t, path)
	mustServe(t, path)
}

func TestALiveSocketIsRefused(t *testing.T) {
	t.Run("of another driver", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "csi.sock")
		mustListen(t, path)
		_, err := listenAt(t.Context(), "unix://"+path)
		if want := "another process holds " + path + ".lock"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		mustServe(t, path)
	})
	t.Run("of another program", func(t *testing.T) {
		dir := shortDir(t)
		path := filepath.Join(dir, "csi.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, err = listenAt(t.Context(), "unix://"+path)
		if want := "another process serves at " + path; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		mustServe(t, path)
		if left, _ := filepath.Glob(dir + "/*"); len(left) != 1 {
			t.Errorf("%v is left", left)
		}
	})
	t.Run("that does not speak our protocol", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "csi.sock")
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := listenAt(t.Context(), "unix://"+path); !errors.Is(err, unix.EPROTOTYPE) {
			t.Errorf("got %v", err)
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	})
}

func TestAFileThatIsNotASocketIsLeftAlone(t *testing.T) {
	for kind, create := range map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"symbolic link": func(path string) error {
			return os.Symlink("/nowhere", path)
		},
	} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "csi.sock")
			if err := create(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = listenAt(t.Context(), "unix://"+path)
			if want := path + " exists and is not a socket; it was left alone"; err == nil || err.Error() != want {
				t.Errorf("got %v, want %s", err, want)
			}
			if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
				t.Errorf("it was replaced (%v)", err)
			}
		})
	}
}

func TestADirectoryThatIsMissingIsNamed(t *testing.T) {
	dir := filepath.Join(shortDir(t), "run")
	_, err := listenAt(t.Context(), "unix://"+dir+"/csi.sock")
	if want := "the directory " + dir + " does not exist; make it first"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestASocketThatReplacedOursSurvivesOurEnd(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	ours := mustListen(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if err := ours.Close(); err != nil {
		t.Error(err)
	}
	mustServe(t, path)
}

func TestOfManyStartsAtOnceOneWins(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "csi.sock")
	for range 50 {
		abandonSocket(t, path)
		const starts = 8
		var (
			begin   = make(chan struct{})
			winners = make(chan *socket, starts)
			all     sync.WaitGroup
		)
		for range starts {
			all.Go(func() {
				<-begin
				if s, err := listenAt(t.Context(), "unix://"+path); err == nil {
					winners <- s
				}
			})
		}
		close(begin)
		all.Wait()
		close(winners)
		if len(winners) != 1 {
			t.Fatalf("%d of %d starts won", len(winners), starts)
		}
		mustServe(t, path)
		if err := (<-winners).Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStartsAndStopsThatRaceNeverServeTwice(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	var (
		serving, started atomic.Int32
		all              sync.WaitGroup
	)
	for range 8 {
		all.Go(func() {
			for range 100 {
				s, err := listenAt(t.Context(), "unix://"+path)
				if err != nil {
					continue
				}
				started.Add(1)
				if n := serving.Add(1); n > 1 {
					t.Errorf("%d serve", n)
				}
				c, err := net.Dial("unix", path)
				if err != nil {
					t.Errorf("one that started cannot be reached: %v", err)
				} else {
					c.Close()
				}
				serving.Add(-1)
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if started.Load() == 0 {
		t.Error("none ever started")
	}
}
