package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/orlop-csi/orlop/pkg/cgroup"
	"github.com/orlop-csi/orlop/pkg/filesystem"
	"github.com/orlop-csi/orlop/pkg/loop"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// holdLimit bounds how long writers are waited for to come to rest, and how long
// they are held after that.
const holdLimit = 10 * time.Second

// settleTime is how long after a cut the writes of a device are counted whose
// users could not be stopped: the kernel may answer a write before it counts it.
const settleTime = 10 * time.Millisecond

// The beginnings of the names of files in .staging that say which volume is
// frozen, and which pod is stopped, with the path of its freezer in the file.
// They need not survive a power failure: no freeze does.
const (
	freezeMark = "freeze-"
	stopMark   = "stop-"
)

// subject is a volume that is to be cut while it may be in use.
type subject struct {
	volume string
	device loop.Device // through which it may be written
}

// hold keeps the writers of some volumes off.
//
// What has a filesystem is frozen: its writers wait, and all that it has in
// memory is on the device. (One that a thaw can harm is not, where it is cut
// alone.) For a raw device the kernel knows no such thing, so the pods that have it
// are stopped, and its writes are counted: a group is only cut if there was none.
type hold struct {
	engine *Engine
	alone  bool // the volumes are cut for themselves, each

	mu       sync.Mutex
	quiet    []quiet
	undo     []func() error // what lets the writers go on, to be done backwards
	watchdog *time.Timer
	ended    bool
	lapsed   error // why it was ended before its time

	once    sync.Once
	thawErr error
}

// quiet is a device that is not to be written to.
type quiet struct {
	subject

	stopped bool   // all its users that we know of
	writes  uint64 // when the hold began
}

// hold begins a hold of volumes. alone is that they are cut for themselves: then
// raw devices, and filesystems that a thaw can harm, are flushed and not held, for
// the reflink of one is atomic. After an error nothing is held.
func (e *Engine) hold(ctx context.Context, subjects []subject, alone bool) (_ *hold, err error) {
	ctx, cancel := context.WithTimeout(ctx, holdLimit)
	defer cancel()
	h := &hold{engine: e, alone: alone}
	if err := e.holds.add(h); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(leaving(err), h.release())
		}
	}()
	mounts := map[string]filesystem.MountPoint{} // by volume
	var raw []subject
	pods := map[string][]string{} // by volume
	for _, s := range subjects {
		filesystems, nodes, err := filesystem.UsesOf(s.device.Number)
		if err != nil {
			return nil, err
		}
		if err := s.device.Check(); err != nil { // or these are uses of another volume, whose device it is by now
			return nil, err
		}
		if len(filesystems) > 0 {
			mounts[s.volume] = filesystems[0]
			continue
		}
		raw = append(raw, s)
		for _, node := range nodes {
			uid, _ := cgroup.Target(node.Path)
			pods[s.volume] = append(pods[s.volume], uid)
		}
	}
	// What can be written out beforehand is, so that the writers are held for
	// a short time only.
	if err := each(subjects, func(s subject) error {
		if at, ok := mounts[s.volume]; ok {
			return timely(s.volume, filesystem.Sync(ctx, at.Path))
		}
		return s.device.Flush()
	}); err != nil {
		return nil, err
	}
	if !alone && len(raw) > 0 {
		// Before a filesystem is frozen, in which they could hang.
		if err := h.silence(ctx, raw, pods); err != nil {
			return nil, err
		}
	}
	return h, h.freeze(ctx, subjects, mounts)
}

// freeze freezes the filesystems, all at once, and starts the clock.
func (h *hold) freeze(ctx context.Context, subjects []subject, mounts map[string]filesystem.MountPoint) error {
	if err := each(subjects, func(s subject) error {
		at, ok := mounts[s.volume]
		if !ok || h.alone && filesystem.Type(at.Type).HarmedByThaw() {
			return nil
		}
		thaw, err := h.engine.freeze(ctx, s.volume, at.Path)
		switch {
		case err == nil:
			return h.onRelease(thaw)
		case errors.Is(err, filesystem.ErrFrozen) && h.alone:
			// Somebody else holds it still (fsfreeze, a backup tool): it is
			// as quiet as we need it, and theirs to thaw.
			return nil
		case errors.Is(err, filesystem.ErrFrozen): // which may be before we are done
			return h.count(ctx, s, false)
		}
		return timely(s.volume, err)
	}); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchdog = time.AfterFunc(holdLimit, func() {
		_ = h.end(pool.Errorf(pool.ErrTimeout, "the volumes could not be cut within %s; repeat when the disks are less busy", holdLimit))
	})
	return nil
}

// onRelease adds what lets writers go on. That is done at once where the hold
// has been ended meanwhile.
func (h *hold) onRelease(undo func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return errors.Join(pool.Errorf(pool.ErrUnavailable, "the hold of the volumes was ended before it began; repeat the call"), undo())
	}
	h.undo = append(h.undo, undo)
	return nil
}

// leaving gives the error of a device or a mount that went away its kind: a staging
// overlaps a cut, and one that fails, or has to begin anew, detaches the volume.
func leaving(err error) error {
	if errors.Is(err, loop.ErrDetached) || errors.Is(err, filesystem.ErrNotMounted) {
		return pool.Errorf(pool.ErrBusy, "a volume was detached just now; repeat the call: %w", err)
	}
	return err
}

// timely gives the error of a filesystem that did not come to rest its kind.
func timely(volume string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return pool.Errorf(pool.ErrTimeout, "the filesystem of volume %s did not come to rest in time; repeat when it is less busy: %w", volume, err)
	}
	return err
}

// silence stops the users of raw devices, brings what the devices have in memory
// to their images, and begins to count their writes.
func (h *hold) silence(ctx context.Context, raw []subject, pods map[string][]string) error {
	stopped := map[string]bool{} // by pod
	for _, s := range raw {
		for _, uid := range pods[s.volume] {
			if _, done := stopped[uid]; done || uid == "" {
				continue
			}
			ours, err := h.stop(ctx, uid)
			if err != nil {
				return err
			}
			stopped[uid] = ours
		}
	}
	for _, s := range raw {
		if err := s.device.Flush(); err != nil {
			return err
		}
	}
	for _, s := range raw {
		users := pods[s.volume]
		all := len(users) > 0 && !slices.ContainsFunc(users, func(uid string) bool { return !stopped[uid] })
		if err := h.count(ctx, s, all); err != nil {
			return err
		}
	}
	return nil
}

// stop stops a pod. One that has no group that we see goes on: the count of its
// writes tells whether that did harm.
func (h *hold) stop(ctx context.Context, uid string) (stopped bool, err error) {
	freezer, err := cgroup.FreezerOf(uid)
	if errors.Is(err, cgroup.ErrNoPod) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	unmark, err := h.engine.mark(stopMark+uid, freezer.Path())
	if errors.Is(err, fs.ErrExist) {
		return false, pool.Errorf(pool.ErrBusy, "pod %s is stopped just now for another group snapshot; repeat the call", uid)
	}
	if err != nil {
		return false, err
	}
	ours, err := freezer.Freeze(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("stopping pod %s, which has a block volume of the group: %w", uid, err), unmark())
		if errors.Is(err, context.DeadlineExceeded) {
			err = pool.Errorf(pool.ErrTimeout, "%w; repeat when it is less busy", err)
		}
		return false, err
	}
	if !ours { // another pool of ours has stopped it, or somebody else
		return true, unmark()
	}
	return true, h.onRelease(func() error { return errors.Join(freezer.Thaw(), unmark()) })
}

// count begins to count the writes of a device, once none is under way.
func (h *hold) count(ctx context.Context, s subject, stopped bool) error {
	for {
		_, underWay, err := s.device.Writes()
		if err != nil {
			return err
		}
		if underWay == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return h.written(s)
		case <-time.After(time.Millisecond):
		}
	}
	writes, _, err := s.device.Writes()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.quiet = append(h.quiet, quiet{s, stopped, writes})
	return err
}

// written is the error of a volume whose writers were not kept off.
func (h *hold) written(s subject) error {
	if v, err := h.engine.Volume(s.volume); err == nil && v.Content == pool.ContentFormatting {
		return pool.Errorf(pool.ErrBusy, "volume %s is still being written to by the mkfs of a driver that was killed; that ends by itself: repeat the call", s.volume)
	}
	return pool.Errorf(pool.ErrPrecondition, "volume %s was written to by somebody who cannot be stopped, and so it cannot be cut together with others: a block volume must be used by pods alone whose control group the driver sees below %s; stop the writer and repeat", s.volume, cgroup.Root)
}

// check finds out whether the writers were kept off all the time until now.
func (h *hold) check() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return h.lapsed
	}
	if slices.ContainsFunc(h.quiet, func(q quiet) bool { return !q.stopped }) {
		time.Sleep(settleTime)
	}
	for _, q := range h.quiet {
		writes, underWay, err := q.device.Writes()
		if err != nil {
			return err
		}
		if writes != q.writes || underWay > 0 {
			return h.written(q.subject)
		}
	}
	return nil
}

// release lets the writers go on.
func (h *hold) release() error { return h.end(nil) }

// end lets the writers go on, because of why if that is before its time.
func (h *hold) end(why error) error {
	h.once.Do(func() {
		h.mu.Lock()
		h.ended, h.lapsed = true, why
		undo := h.undo
		if h.watchdog != nil {
			h.watchdog.Stop()
		}
		h.mu.Unlock()
		for _, undo := range slices.Backward(undo) {
			h.thawErr = errors.Join(h.thawErr, undo())
		}
		h.engine.holds.remove(h)
	})
	return h.thawErr
}

// freeze freezes the filesystem of a volume. Who gave up waiting leaves nothing
// frozen: a freeze that comes too late is ended at once, and until then the mark
// stays that has the next start of the driver do so.
func (e *Engine) freeze(ctx context.Context, volume, mountpoint string) (thaw func() error, err error) {
	unmark, err := e.mark(freezeMark+volume, "")
	if errors.Is(err, fs.ErrExist) {
		return nil, pool.Errorf(pool.ErrBusy, "an earlier freeze of volume %s has not returned from the kernel; repeat the call", volume)
	}
	if err != nil {
		return nil, err
	}
	type outcome struct {
		thaw func() error
		err  error
	}
	done := make(chan outcome)
	e.holds.freezing.Add(1)
	go func() {
		defer e.holds.freezing.Add(-1)
		var o outcome
		if o.thaw, o.err = filesystem.Freeze(context.WithoutCancel(ctx), mountpoint); o.err != nil {
			o.err = errors.Join(o.err, unmark())
		}
		select {
		case done <- o:
		case <-ctx.Done():
			if o.err == nil && o.thaw() == nil {
				_ = unmark() // the next start of the driver finds it
			}
		}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, o.err
		}
		return func() error {
			if err := o.thaw(); err != nil {
				return err
			}
			return unmark()
		}, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("freeze %s: %w", mountpoint, ctx.Err())
	}
}

// mark makes a file in .staging for the next start of the driver, should this
// one die. While it means something it is fs.ErrExist; one that could not be
// removed means nothing any more.
func (e *Engine) mark(name, text string) (unmark func() error, err error) {
	if !e.holds.begin(name) {
		return nil, fs.ErrExist
	}
	defer func() {
		if err != nil {
			e.holds.end(name)
		}
	}()
	at := path.Join(stagingDir, name)
	f, err := e.root.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, noSpace(err)
	}
	defer f.Close()
	if text != "" {
		if _, err := f.WriteString(text); err != nil {
			return nil, errors.Join(noSpace(err), e.root.Remove(at))
		}
	}
	return func() error {
		defer e.holds.end(name)
		return e.root.Remove(at)
	}, nil
}

// letGo ends, at the start of the driver, the hold of a mark that a crash left.
func (e *Engine) letGo(mark string) error {
	if volume, ok := strings.CutPrefix(mark, freezeMark); ok {
		if err := e.thaw(volume); err != nil {
			return fmt.Errorf("thawing volume %s, which a snapshot had frozen: %w", volume, err)
		}
	}
	if uid, ok := strings.CutPrefix(mark, stopMark); ok {
		text, err := e.root.ReadFile(path.Join(stagingDir, mark))
		if err != nil || len(text) == 0 { // it died before it stopped anything
			return err
		}
		freezer, err := cgroup.FreezerAt(string(text))
		if err == nil {
			err = freezer.Thaw()
		}
		if err != nil {
			return fmt.Errorf("letting pod %s go on, which a snapshot had stopped: %w", uid, err)
		}
	}
	return nil
}

// holds is all holds of an engine.
type holds struct {
	freezing atomic.Int64 // calls of the kernel that have not returned

	mu     sync.Mutex
	all    map[*hold]struct{}
	marks  map[string]struct{} // that mean something
	closed bool
}

// begin enters a mark, unless it is there.
func (h *holds) begin(mark string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, there := h.marks[mark]; there {
		return false
	}
	if h.marks == nil {
		h.marks = map[string]struct{}{}
	}
	h.marks[mark] = struct{}{}
	return true
}

func (h *holds) end(mark string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.marks, mark)
}

// add enters a hold that begins, unless there is to be none any more.
func (h *holds) add(one *hold) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return errEnding
	}
	if h.all == nil {
		h.all = map[*hold]struct{}{}
	}
	h.all[one] = struct{}{}
	return nil
}

func (h *holds) remove(one *hold) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, one)
}

// close has no more holds begin, and gives those that there are.
func (h *holds) close() []*hold {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	var list []*hold
	for one := range h.all {
		list = append(list, one)
	}
	return list
}

// Thaw implements [pool.Engine]. A freeze that is under way is waited for as
// long as one may take.
func (e *Engine) Thaw() {
	for _, h := range e.holds.close() {
		_ = h.end(errEnding)
	}
	for deadline := time.Now().Add(holdLimit); e.holds.freezing.Load() > 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
}

// errEnding is why nothing is held when the process ends.
var errEnding = pool.Errorf(pool.ErrUnavailable, "the driver is shutting down; repeat the call")

// each runs work for every entry at once, and gives their errors.
func each[T any](list []T, work func(T) error) error {
	errs := make([]error, len(list))
	var running sync.WaitGroup
	for i, entry := range list {
		running.Go(func() { errs[i] = work(entry) })
	}
	running.Wait()
	return errors.Join(errs...)
}
