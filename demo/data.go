package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checksum is the SHA-256 of some content.
type checksum [sha256.Size]byte

// tree is the content of files by their path below a directory.
type tree map[string]checksum

// recordsFile is the writer's file in a volume; no tree has it.
const recordsFile = "records.log"

// fileSizes are the sizes in bytes of the files of one folder: many small ones
// and a few large ones, most of them no multiple of anything. A folder has
// about 32 MiB.
var fileSizes = func() (sizes []int64) {
	for range 32 {
		sizes = append(sizes, 9_001)
	}
	for range 16 {
		sizes = append(sizes, 200_003)
	}
	for range 4 {
		sizes = append(sizes, 3_000_017)
	}
	return append(sizes, 16*mib)
}()

// noise gives bytes that nobody can compress, and that are others each time.
func noise() io.Reader {
	var seed [32]byte
	_, _ = rand.Read(seed[:]) // never fails
	return mathrand.NewChaCha8(seed)
}

// writeTree fills a directory with files, total bytes in all, and brings them
// to the disk.
func writeTree(ctx context.Context, dir string, total int64) (tree, error) {
	files, source := tree{}, noise()
	for folder := 1; total > 0; folder++ {
		sub := fmt.Sprintf("folder-%03d", folder)
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
		for i := len(fileSizes) - 1; i >= 0 && total > 0; i-- {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			name := filepath.Join(sub, fmt.Sprintf("file-%02d", i))
			size := min(fileSizes[i], total)
			sum, err := writeFile(filepath.Join(dir, name), io.LimitReader(source, size))
			if err != nil {
				return nil, err
			}
			files[name] = sum
			total -= size
		}
	}
	return files, syncFilesystem(dir)
}

// writeFile writes a file from its beginning on; more than that it keeps.
func writeFile(path string, source io.Reader) (sum checksum, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	hash := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(f, hash), source, make([]byte, mib)); err != nil {
		return sum, err
	}
	return checksum(hash.Sum(nil)), nil
}

// verifyTree reads every file below a directory from the disk, and compares:
// none may be missing, none too many, none other than it was written.
func verifyTree(ctx context.Context, dir string, want tree) error {
	seen := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case entry.IsDir(), entry.Name() == recordsFile:
			return nil
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		sum, ok := want[name]
		if !ok {
			return fmt.Errorf("%s should not be there", path)
		}
		seen++
		got, err := readFile(path)
		if err != nil {
			return err
		}
		if got != sum {
			return fmt.Errorf("%s is not as it was written: its SHA-256 is %x, not %x", path, got, sum)
		}
		return nil
	})
	if err == nil && seen != len(want) {
		err = fmt.Errorf("%s has %d files, not %d", dir, seen, len(want))
	}
	return err
}

// readFile reads a file from the disk: what the page cache has of it is dropped
// first.
func readFile(path string) (sum checksum, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return sum, fmt.Errorf("fadvise %s: %w", path, err)
	}
	hash := sha256.New()
	if _, err := io.CopyBuffer(hash, f, make([]byte, mib)); err != nil {
		return sum, err
	}
	return checksum(hash.Sum(nil)), nil
}

// extent is a range of a block device whose content is known.
type extent struct {
	offset, length int64 // bytes, multiples of 1 MiB
	sum            checksum
}

// write fills the range with noise, past the page cache (O_DIRECT).
func (e *extent) write(ctx context.Context, path string) error {
	source := noise()
	sum, err := e.pass(ctx, path, unix.O_WRONLY, func(f *os.File, buffer []byte, at int64) error {
		if _, err := io.ReadFull(source, buffer); err != nil {
			return err
		}
		_, err := f.WriteAt(buffer, at)
		return err
	}, (*os.File).Sync)
	e.sum = sum
	return err
}

// verify reads the range, past the page cache, and compares.
func (e *extent) verify(ctx context.Context, path string) error {
	sum, err := e.pass(ctx, path, unix.O_RDONLY, func(f *os.File, buffer []byte, at int64) error {
		_, err := f.ReadAt(buffer, at)
		return err
	}, nil)
	if err == nil && sum != e.sum {
		err = fmt.Errorf("%s, bytes %d to %d, is not as it was written: its SHA-256 is %x, not %x", path, e.offset, e.offset+e.length, sum, e.sum)
	}
	return err
}

// pass goes through the range by steps of 1 MiB, with a buffer that is aligned
// as O_DIRECT needs it, and gives the checksum of what passed through it.
func (e *extent) pass(ctx context.Context, path string, mode int, each func(*os.File, []byte, int64) error, last func(*os.File) error) (sum checksum, err error) {
	buffer, err := unix.Mmap(-1, 0, mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return sum, fmt.Errorf("mmap: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(buffer)) }()
	f, err := os.OpenFile(path, mode|unix.O_DIRECT, 0)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	hash := sha256.New()
	for at := e.offset; at < e.offset+e.length; at += mib {
		if err := errors.Join(ctx.Err(), each(f, buffer, at)); err != nil {
			return sum, err
		}
		hash.Write(buffer)
	}
	if last != nil {
		if err := last(f); err != nil {
			return sum, err
		}
	}
	return checksum(hash.Sum(nil)), nil
}
