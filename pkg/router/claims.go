package router

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Claims is what of a driver's volumes and snapshots somebody names, by ID. Of a
// kind that is nil nothing can be said.
type Claims struct {
	Volumes, Snapshots map[string]struct{}
	// AsOf is a moment at which these were the claims, or one before: what was
	// claimed then, and has been since, is among them.
	AsOf time.Time
}

// Claimer tells what is claimed. It reads that when it is asked, and is an error
// if it cannot: what is not known to be unclaimed is claimed.
type Claimer interface {
	Claimed(ctx context.Context) (Claims, error)
}

// FileClaims is the path of a file that lists what is claimed, one ID a line.
// Empty lines, and what follows a #, do not count. The claims are as of the
// file's modification time, so that a file that is not kept up makes no orphan
// of a newer volume. It is to be replaced by renaming another into its place.
type FileClaims string

// Claimed implements [Claimer].
func (f FileClaims) Claimed(context.Context) (Claims, error) {
	file, err := os.Open(string(f))
	if err != nil {
		return Claims{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return Claims{}, err
	}
	text, err := io.ReadAll(file)
	if err != nil {
		return Claims{}, fmt.Errorf("%s: %w", f, err)
	}
	ids := map[string]struct{}{}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		if id := strings.TrimSpace(line); id != "" {
			ids[id] = struct{}{}
		}
	}
	return Claims{Volumes: ids, Snapshots: ids, AsOf: info.ModTime()}, nil
}
