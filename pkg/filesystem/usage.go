package filesystem

import (
	"context"

	"golang.org/x/sys/unix"
)

// Usage is how full a filesystem is.
type Usage struct {
	Bytes  Amount
	Inodes Amount // all 0 for btrfs, which has no limit of them
}

// Amount is a part of a filesystem. Available is what an unprivileged user can
// have, and may be less than Total - Used.
type Amount struct{ Total, Used, Available int64 }

// Stat tells how full the filesystem is that path is on: statfs(2).
func Stat(ctx context.Context, path string) (Usage, error) {
	return within(ctx, "statfs "+path, func() (Usage, error) {
		var s unix.Statfs_t
		if err := unix.Statfs(path, &s); err != nil {
			return Usage{}, err
		}
		unit := int64(s.Frsize)
		return Usage{
			Bytes: Amount{
				Total:     int64(s.Blocks) * unit,
				Used:      int64(s.Blocks-s.Bfree) * unit,
				Available: int64(s.Bavail) * unit,
			},
			Inodes: Amount{
				Total:     int64(s.Files),
				Used:      int64(s.Files - s.Ffree),
				Available: int64(s.Ffree),
			},
		}, nil
	}, nil)
}
