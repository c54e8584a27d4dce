package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// What is read of a device before it counts as blank, in bytes: its two ends,
// where every known format has its mark, and samples spread evenly between.
const (
	blankEnds    = 16 << 20
	blankSample  = 64 << 10
	blankSamples = 1024
)

// mustBeBlank refuses a block device unless all of this holds: nobody has it
// open exclusively (mounted, part of an array, a volume group), it has no
// partitions, blkid finds no signature on it, and its first and last 16 MiB and
// 1,024 samples between them read as zeros. A device of up to 96 MiB is read
// whole.
func mustBeBlank(ctx context.Context, device string, number uint64) error {
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return pool.Errorf(pool.ErrInUse, "it is in use (mounted, or part of something else)")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	sysfs := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number))
	partitions, err := filepath.Glob(filepath.Join(sysfs, "*", "partition"))
	if err != nil {
		return err
	}
	if len(partitions) > 0 {
		return pool.Errorf(pool.ErrPrecondition, "it has %d partitions", len(partitions))
	}
	if err := mustHaveNoSignature(ctx, device); err != nil {
		return err
	}
	// Else the kernel reads megabytes ahead of each sample.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return fmt.Errorf("fadvise %s: %w", device, err)
	}
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	for _, piece := range blankPieces(size) {
		if err := mustReadZeros(f, piece[0], piece[1]); err != nil {
			return err
		}
	}
	return nil
}

// blankPieces gives the ranges to read of a device, as offset and length.
func blankPieces(size int64) [][2]int64 {
	if size <= 2*blankEnds+blankSamples*blankSample {
		return [][2]int64{{0, size}}
	}
	pieces := [][2]int64{{0, blankEnds}, {size - blankEnds, blankEnds}}
	step := (size - 2*blankEnds) / blankSamples
	for i := range int64(blankSamples) {
		pieces = append(pieces, [2]int64{blankEnds + i*step, blankSample})
	}
	return pieces
}

var zeros [blankSample]byte

func mustReadZeros(f *os.File, off, n int64) error {
	buf := make([]byte, blankSample)
	for n > 0 {
		piece := buf[:min(n, blankSample)]
		if _, err := f.ReadAt(piece, off); err != nil {
			return err
		}
		if !bytes.Equal(piece, zeros[:len(piece)]) {
			return pool.Errorf(pool.ErrPrecondition, "it has data near byte %d; if nobody needs it, blank it with blkdiscard or dd", off)
		}
		off += int64(len(piece))
		n -= int64(len(piece))
	}
	return nil
}

// mustHaveNoSignature asks blkid, which knows the marks of filesystems, RAID,
// LVM, partition tables and more. Its exit code 2 means that it found none
// (blkid(8)).
func mustHaveNoSignature(ctx context.Context, device string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "blkid", "-p", "-o", "export", device)
	cmd.WaitDelay = time.Second // for who has its output open still
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == 2:
		return nil
	case err != nil:
		return fmt.Errorf("blkid: %w: %.200s", err, out)
	}
	return pool.Errorf(pool.ErrPrecondition, "it has something on it: %s; if nobody needs that, remove it with wipefs -a", strings.Join(strings.Fields(string(out)), " "))
}
