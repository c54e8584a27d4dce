package extent

import (
	"os"

	"golang.org/x/sys/unix"
)

// ReadAhead lets the disk read [off, off+n) of f, which will be wanted soon, and
// waits for nothing. It is advice: that the kernel does not take it is no error.
// See posix_fadvise(2).
func ReadAhead(f *os.File, off, n int64) {
	_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_WILLNEED)
}
