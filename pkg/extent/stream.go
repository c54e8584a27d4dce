package extent

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Flush begins to write to the disk what [off, off+n) of f has in memory, and
// waits for nothing. It brings nothing to stable storage by itself. See
// sync_file_range(2).
func Flush(f *os.File, off, n int64) error {
	if err := unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		return fmt.Errorf("flush %s: %w", f.Name(), err)
	}
	return nil
}

// ReadAhead lets the disk read [off, off+n) of f, which will be wanted soon, and
// waits for nothing. It is advice: that the kernel does not take it is no error.
// See posix_fadvise(2).
func ReadAhead(f *os.File, off, n int64) {
	_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_WILLNEED)
}
