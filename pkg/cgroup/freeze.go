package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Freezer stops all processes of a group and lets them go on. A stopped one is
// not in the middle of a system call, except one that waits for something.
type Freezer struct {
	file string // that is written to: freezer.state (v1) or cgroup.freeze (v2)
}

// The files of the freezers.
const (
	stateV1 = "freezer.state"
	stateV2 = "cgroup.freeze"
)

// FreezerOf finds the freezer of a pod. Where the host has the hierarchy of
// version 1 and the pod a group in it, it is that: a process that is stopped by
// the one freezer never comes to rest for the other. A pod without any is
// ErrNoPod.
func FreezerOf(uid string) (Freezer, error) {
	for _, h := range []struct{ root, file string }{
		{filepath.Join(Root, "freezer"), stateV1},
		{filepath.Join(Root, "unified"), stateV2},
		{Root, stateV2},
	} {
		if _, err := os.Stat(filepath.Join(h.root, "cgroup.procs")); err != nil {
			continue // not the root of a hierarchy
		}
		dir, err := findBelow(h.root, uid)
		if err != nil {
			return Freezer{}, err
		}
		if dir != "" {
			return Freezer{filepath.Join(dir, h.file)}, nil
		}
	}
	return Freezer{}, fmt.Errorf("pod %s %w", uid, ErrNoPod)
}

// FreezerAt is the freezer that Path gave.
func FreezerAt(path string) (Freezer, error) {
	base := filepath.Base(path)
	if filepath.Clean(path) != path || !strings.HasPrefix(path, Root+"/") || base != stateV1 && base != stateV2 {
		return Freezer{}, fmt.Errorf("%.200q is not the freezer of a control group", path)
	}
	return Freezer{path}, nil
}

// Path identifies the freezer, for one who comes after a crash.
func (f Freezer) Path() string { return f.file }

func (f Freezer) v1() bool { return filepath.Base(f.file) == stateV1 }

// Freeze stops the group and waits until every process in it stands still. One
// that was stopped already stays so, and is not ours to let go
// on: somebody else will, or nobody, if a process died in between; then Thaw
// does. After an error nothing of ours is stopped.
func (f Freezer) Freeze(ctx context.Context) (ours bool, err error) {
	frozen, err := f.Frozen()
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil && ours {
			ours, err = false, errors.Join(err, f.Thaw())
		}
	}()
	if ours = !frozen; ours {
		if err := f.write("FROZEN", "1"); err != nil {
			return ours, err
		}
	}
	for { // version 1 tells of no event, and moves on as it is looked at
		if settled, err := f.settled(); err != nil || settled {
			return ours, err
		}
		select {
		case <-ctx.Done():
			return ours, fmt.Errorf("%s: its processes do not come to rest: %w", f.file, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// Frozen tells whether the group itself was told to stop.
func (f Freezer) Frozen() (bool, error) {
	text, err := os.ReadFile(f.file)
	if err != nil {
		return false, err
	}
	state := string(bytes.TrimSpace(text))
	return state != "THAWED" && state != "0", nil
}

// settled tells whether every process stands still.
func (f Freezer) settled() (bool, error) {
	if f.v1() {
		text, err := os.ReadFile(f.file)
		return string(bytes.TrimSpace(text)) == "FROZEN", err
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(f.file), "cgroup.events"))
	return bytes.Contains(append([]byte("\n"), text...), []byte("\nfrozen 1\n")), err
}

// Thaw lets the group go on. One that is gone needs it no more.
func (f Freezer) Thaw() error {
	err := f.write("THAWED", "0")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (f Freezer) write(v1, v2 string) error {
	text := v2
	if f.v1() {
		text = v1
	}
	file, err := os.OpenFile(f.file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(text)
	return err
}
