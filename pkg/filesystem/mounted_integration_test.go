//go:build integration

package filesystem

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writer writes and fsyncs files in a directory, one after the other, until it
// is stopped. It says on progress when one is done.
type writer struct {
	stop     context.CancelFunc
	progress chan int
	done     chan error
}

var content = bytes.Repeat([]byte("orlop "), 10_000)

func writeInto(t *testing.T, dir string) *writer {
	ctx, cancel := context.WithCancel(context.Background())
	w := &writer{stop: cancel, progress: make(chan int), done: make(chan error, 1)}
	ended := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-ended // or it would hold the mount
	})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			if err := writeOne(filepath.Join(dir, fmt.Sprint(i))); err != nil {
				w.done <- err
				return
			}
			select {
			case w.progress <- i:
			case <-ctx.Done():
				w.done <- nil
				return
			}
		}
	}()
	return w
}

func writeOne(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Write(content); err != nil {
		return err
	}
	return file.Sync()
}

func TestGrowWhileInUse(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := d.mounted(t, fs)
		w := writeInto(t, target)
		<-w.progress

		mustGrowOnline(t, fs)
		for _, size := range []int64{roomy + 10*4096, roomy + mib, 2 * gib, 2*gib + 12345*4096, 20 * gib} {
			d.resize(t, size)
			for range 2 {
				must(t, Grow(soon(t), target))
			}
			usage, err := Stat(soon(t), target)
			must(t, err)
			if usage.Bytes.Total > size || usage.Bytes.Total < size-size/8-64*mib {
				t.Errorf("it can hold %d bytes of %d", usage.Bytes.Total, size)
			}
			<-w.progress
		}
		last := <-w.progress
		w.stop()
		must(t, <-w.done)
		for i := range last + 1 {
			wantFile(t, filepath.Join(target, fmt.Sprint(i)), string(content))
		}
		must(t, Unmount(soon(t), target))
		d.wantSound(t, fs)
		// A unit of space that is not whole is left out: an allocation group
		// needs room for its tables.
		if info, err := Probe(d.path); err != nil || info.Size > 20*gib || info.Size < 20*gib-32*mib {
			t.Errorf("%+v, %v", info, err)
		}
	})
}

// mustGrowOnline ends a test of growing ext4 where the kernel forbids it.
func mustGrowOnline(t *testing.T, fs Type) {
	t.Helper()
	if fs == Ext4 && !mayGrowMounted() {
		t.Skip("NOT TESTED: growing ext4 takes CAP_SYS_RESOURCE, which even root does not have here")
	}
}

// Beyond a thousandfold ext4 has no blocks reserved for group descriptors.
func TestGrowFromLittleToMuch(t *testing.T) {
	for _, test := range []struct {
		fs       Type
		from, to int64
		options  []string
	}{
		{fs: Ext4, from: Ext4.MinSize(), to: 200 * gib},
		{fs: Ext4, from: gib, to: 200 * gib},
		{fs: Ext4, from: gib, to: 4096 * gib},
		{fs: Ext4, from: 64 * mib, to: 20 * gib, options: []string{"-b", "1024"}},
		{fs: XFS, from: XFS.MinSize(), to: 20 * gib},
		{fs: Btrfs, from: Btrfs.MinSize(), to: 4096 * gib},
	} {
		t.Run(fmt.Sprintf("%s from %d to %d MiB %q", test.fs, test.from/mib, test.to/mib, test.options), func(t *testing.T) {
			mustGrowOnline(t, test.fs)
			d := made(t, test.fs, test.from, test.options...)
			target := d.mounted(t, test.fs)
			write(t, filepath.Join(target, "before"), "before")
			d.resize(t, test.to)
			must(t, Grow(soon(t), target))
			write(t, filepath.Join(target, "after"), "after")
			usage, err := Stat(soon(t), target)
			must(t, err)
			if usage.Bytes.Total < test.to/10*9 {
				t.Errorf("it can hold %d bytes of %d", usage.Bytes.Total, test.to)
			}
			must(t, Unmount(soon(t), target))
			d.wantSound(t, test.fs)
			must(t, Mount(soon(t), d.path, target, test.fs, nil, false))
			wantFile(t, filepath.Join(target, "before"), "before")
			wantFile(t, filepath.Join(target, "after"), "after")
		})
	}
}

func TestGrowRefuses(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		mustGrowOnline(t, fs)
		d := made(t, fs, roomy)
		target := t.TempDir()
		must(t, Mount(soon(t), d.path, target, fs, nil, true))
		unmountAfter(t, target)
		d.resize(t, 2*roomy)
		wantError(t, Grow(soon(t), target), unix.EROFS, "read-only", target)
	})
	t.Run("what is no mount point", func(t *testing.T) {
		wantError(t, Grow(soon(t), t.TempDir()), ErrNotMounted)
	})
	t.Run("another type", func(t *testing.T) {
		target := t.TempDir()
		must(t, unix.Mount("tmpfs", target, "tmpfs", 0, ""))
		unmountAfter(t, target)
		wantError(t, Grow(soon(t), target), nil, "cannot be grown")
	})
	t.Run("one with errors", func(t *testing.T) {
		d := made(t, Ext4, roomy)
		tool(t, "debugfs", "-w", "-R", "set_super_value state 2", d.path)
		target := d.mounted(t, Ext4)
		d.resize(t, 2*roomy)
		wantError(t, Grow(soon(t), target), unix.EPERM, "CAP_SYS_RESOURCE", "no errors")
	})
}

func TestFreezeHoldsWritersUntilTheThaw(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := d.mounted(t, fs)
		w := writeInto(t, target)
		<-w.progress

		thaw, err := Freeze(soon(t), target)
		must(t, err)
		defer func() { _ = thaw() }()
		copied := d.copy(t)
		for range 2 { // one may have been ready to be told
			select {
			case <-w.progress:
			case <-time.After(200 * time.Millisecond):
			}
		}
		select {
		case <-w.progress:
			t.Error("a file was written while frozen")
		case <-time.After(200 * time.Millisecond):
		}
		_, err = Freeze(soon(t), target)
		wantError(t, err, ErrFrozen, target)
		wantError(t, Unmount(soon(t), target), ErrBusy)

		must(t, thaw())
		<-w.progress
		must(t, thaw()) // once is enough
		w.stop()
		must(t, <-w.done)

		// What was copied is sound, but for XFS not without its log: the
		// kernel leaves an entry in it, so that what was deleted while open
		// is freed at the next mount.
		other := t.TempDir()
		must(t, RenewUUID(soon(t), copied.path, fs))
		must(t, Mount(soon(t), copied.path, other, fs, nil, false))
		unmountAfter(t, other)
		must(t, Unmount(soon(t), other))
		copied.wantSound(t, fs)
	})
}

func TestThawAfterWhoFrozeIsGone(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		target := made(t, fs, roomy).mounted(t, fs)
		if was, err := Thaw(target); was || err != nil {
			t.Errorf("not frozen: %v, %v", was, err)
		}
		thaw, err := Freeze(soon(t), target)
		must(t, err)
		if was, err := Thaw(target); !was || err != nil {
			t.Errorf("frozen: %v, %v", was, err)
		}
		write(t, filepath.Join(target, "file"), "")
		must(t, thaw()) // it is thawed already
	})
}

// What Unmount warns of, and the way out.
func TestUnmountOfWhatWasLeftFrozen(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		d := made(t, fs, roomy)
		target := d.mounted(t, fs)
		fd, err := openMount(target)
		must(t, err)
		_, err = ioctl[struct{}](fd, fiFreeze, nil)
		unix.Close(fd) // as when the process dies
		must(t, err)

		must(t, Unmount(soon(t), target))
		if d.idle() {
			t.Error("the device is idle")
		}
		must(t, Mount(soon(t), d.path, target, fs, nil, false))
		if was, err := Thaw(target); !was || err != nil {
			t.Error(was, err)
		}
		must(t, Unmount(soon(t), target))
		if !d.idle() {
			t.Error("the device is still in use")
		}
	})
}

func TestFreezeOfAReadOnlyMount(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		target := t.TempDir()
		must(t, Mount(soon(t), made(t, fs, roomy).path, target, fs, nil, true))
		unmountAfter(t, target)
		thaw, err := Freeze(soon(t), target)
		must(t, err)
		must(t, thaw())
	})
}

// Whenever the context ends, nothing stays frozen.
func TestFreezeThatComesTooLate(t *testing.T) {
	target := made(t, Ext4, 2*gib).mounted(t, Ext4)
	inTime, late := 0, 0
	for i := range 40 {
		// Much to write before the freeze, so that it takes some time.
		must(t, os.WriteFile(filepath.Join(target, "large"), make([]byte, 16*mib), 0o600))
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*time.Millisecond)
		thaw, err := Freeze(ctx, target)
		cancel()
		if err == nil {
			inTime++
			must(t, thaw())
		} else {
			late++
			wantError(t, err, context.DeadlineExceeded, target)
		}
		done := make(chan error, 1)
		go func() { done <- os.WriteFile(filepath.Join(target, "small"), nil, 0o600) }()
		select {
		case err := <-done:
			must(t, err)
		case <-time.After(10 * time.Second):
			_, _ = Thaw(target)
			t.Fatal("left frozen")
		}
	}
	thaw, err := Freeze(soon(t), target) // waits for the one that still goes on
	must(t, err)
	must(t, thaw())
	t.Logf("%d in time, %d too late", inTime, late)
	if late == 0 {
		t.Error("none came too late")
	}
}

// The node's own filesystem must not be hit because a volume is not mounted.
func TestWhatIsDoneToAMountIsNotDoneToADirectory(t *testing.T) {
	dir := t.TempDir()
	thaw, err := Freeze(soon(t), dir)
	if err == nil {
		_ = thaw()
	}
	wantError(t, err, ErrNotMounted, dir)
	_, err = Thaw(dir)
	wantError(t, err, ErrNotMounted, dir)
}

func TestStat(t *testing.T) {
	eachType(t, func(t *testing.T, fs Type) {
		target := made(t, fs, roomy).mounted(t, fs)
		before, err := Stat(soon(t), target)
		must(t, err)
		write(t, filepath.Join(target, "file"), string(make([]byte, 16*mib)))
		unix.Sync()
		after, err := Stat(soon(t), target)
		must(t, err)
		b, i := after.Bytes, after.Inodes
		if b.Total < roomy/2 || b.Total > roomy || b.Used-before.Bytes.Used < 16*mib || before.Bytes.Available-b.Available < 16*mib {
			t.Errorf("bytes %+v, then %+v", before.Bytes, b)
		}
		if fs == Btrfs {
			if i != (Amount{}) {
				t.Errorf("inodes %+v", i)
			}
		} else if i.Used != before.Inodes.Used+1 || i.Total != i.Used+i.Available {
			t.Errorf("inodes %+v, then %+v", before.Inodes, i)
		}
	})
	_, err := Stat(soon(t), "/no/such/path")
	wantError(t, err, unix.ENOENT, "/no/such/path")
}
