// Package config reads the driver's configuration file: which pools a node has
// and what each is made of.
//
// It checks what the text alone can tell, and touches nothing that the text
// names: whether a path is there, and whether a device is blank, is found out
// when the pool is opened.
package config

import (
	"fmt"
	"os"
)

// Config is a configuration that has been checked: a pool engine can be given
// any part of it as it is.
type Config struct {
	Pools []Pool // at least one, as ordered in the file
}

// Pool is one pool of the node.
type Pool struct {
	Name       string // a DNS label, unique among the pools
	Source     Source
	Reserve    Reserve
	Overcommit float64 // how many bytes are promised per byte of the pool; 1 to MaxOvercommit
}

// Source is what a pool's storage is made of: exactly one of its fields is set.
// Its paths are absolute and clean (path/filepath.Clean).
type Source struct {
	File      *FileSource
	Directory string // an existing directory, used as it is
	Device    string // a block device, formatted only if it is blank
}

// Path gives the one path of the source.
func (s Source) Path() string {
	if s.File != nil {
		return s.File.Path
	}
	return s.Directory + s.Device
}

// FileSource is a pool inside one image file.
type FileSource struct {
	Path   string
	Size   int64 // bytes, at least MinFileSize
	Sparse bool  // the file's blocks are not allocated beforehand
}

// Reserve is the part of a pool that is kept free: a share of its capacity or a
// number of bytes. At most one of the fields is not zero.
type Reserve struct {
	Percent float64 // from 0 to less than 100
	Bytes   int64
}

// Of gives the reserve of a pool with that capacity, in bytes.
func (r Reserve) Of(capacity int64) int64 {
	if r.Bytes > 0 {
		return r.Bytes
	}
	return int64(r.Percent / 100 * float64(capacity))
}

// Limits and defaults.
const (
	// MinFileSize is the smallest image file that a pool is made in, in bytes:
	// mkfs.xfs makes nothing below 300 MB, and of that little would be left.
	MinFileSize = 512 << 20

	// DefaultReserve is the reserve of a pool that names none, in percent.
	DefaultReserve = 5

	// MaxOvercommit is far above any use. It keeps capacity times overcommit
	// within 64 bits.
	MaxOvercommit = 1000
)

// Load reads and checks the file. Every error is one line that names the file
// and the field.
func Load(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	c, err := Parse(text)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}
