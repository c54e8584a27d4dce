package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// formatVersion is the version of all that a pool has on disk. It rises when an
// older driver could no longer read it rightly.
const formatVersion = 1

// maxMetadata bounds what is read of a metadata file, in bytes.
const maxMetadata = 1 << 20

// envelope is the form of every metadata file. The checksum covers the compact
// form of the payload, so that a file can be read, and indented, by people.
type envelope struct {
	Version int             `json:"version"`
	CRC32C  string          `json:"crc32c"`
	Payload json.RawMessage `json:"payload"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(payload []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(payload, castagnoli))
}

// encode makes the bytes of a metadata file.
func encode(v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(envelope{Version: formatVersion, CRC32C: checksum(payload), Payload: payload}, "", "  ")
	return append(data, '\n'), err
}

// decode reads the bytes of a metadata file into v. Whatever is wrong with them
// is pool.ErrDamaged.
func decode(data []byte, v any) error {
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return pool.Errorf(pool.ErrDamaged, "not a metadata file: %w", err)
	}
	if e.Version != formatVersion {
		return pool.Errorf(pool.ErrDamaged, "format version %d; this driver knows version %d", e.Version, formatVersion)
	}
	var payload bytes.Buffer
	if err := json.Compact(&payload, e.Payload); err != nil {
		return pool.Errorf(pool.ErrDamaged, "payload: %w", err)
	}
	if sum := checksum(payload.Bytes()); sum != e.CRC32C {
		return pool.Errorf(pool.ErrDamaged, "checksum is %s, the file says %.16q", sum, e.CRC32C)
	}
	if err := json.Unmarshal(payload.Bytes(), v); err != nil {
		return pool.Errorf(pool.ErrDamaged, "payload: %w", err)
	}
	return nil
}

// openRegular opens a regular file in a directory of the pool. A link that
// somebody planted in the place of one of the two is not followed, even if it
// stays in the pool: it would make one volume another.
func openRegular(root *os.Root, name string, flag int) (*os.File, error) {
	f, _, err := openSized(root, name, flag)
	return f, err
}

// openSized is openRegular, and tells the file's size.
func openSized(root *os.Root, name string, flag int) (*os.File, int64, error) {
	if dir := path.Dir(name); dir != "." {
		if err := mustBeDir(root, dir); err != nil {
			return nil, 0, err
		}
	}
	info, err := root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, pool.Errorf(pool.ErrDamaged, "%s is not a regular file (%s)", filepath.Join(root.Name(), name), info.Mode())
	}
	f, err := root.OpenFile(name, flag, 0)
	return f, info.Size(), err
}

// openFolder opens a directory for who has much to do in it. Like openRegular it
// follows no link.
func openFolder(root *os.Root, name string) (*os.Root, error) {
	if err := mustBeDir(root, name); err != nil {
		return nil, err
	}
	return root.OpenRoot(name)
}

func mustBeDir(root *os.Root, name string) error {
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return pool.Errorf(pool.ErrDamaged, "%s is not a directory (%s)", filepath.Join(root.Name(), name), info.Mode())
	}
	return nil
}

// readMetadata reads one metadata file of the pool.
func readMetadata(root *os.Root, name string, v any) error {
	f, size, err := openSized(root, name, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	return readOpen(f, size, v)
}

// readOpen reads a metadata file of that size.
func readOpen(f *os.File, size int64, v any) error {
	data := make([]byte, min(size, maxMetadata))
	n, err := io.ReadFull(f, data)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) { // decode tells of one that is too short
		return err
	}
	if err := decode(data[:n], v); err != nil {
		return fmt.Errorf("%s: %w", path.Base(f.Name()), err)
	}
	return nil
}

// writeMetadata makes a new metadata file, on stable storage but for its
// directory entry. If it fails, there is none.
func writeMetadata(root *os.Root, name string, v any) (err error) {
	data, err := encode(v)
	if err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, root.Remove(name))
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// replaceMetadata puts a metadata file in the place of another in one step. On
// return it is on stable storage.
func replaceMetadata(root *os.Root, name, staged string, v any) error {
	if err := mustBeDir(root, path.Dir(name)); err != nil {
		return err
	}
	if err := writeMetadata(root, staged, v); err != nil {
		return err
	}
	if err := root.Rename(staged, name); err != nil {
		return err
	}
	return syncDir(root, path.Dir(name))
}

// syncDir brings the entries of a directory to stable storage.
func syncDir(root *os.Root, name string) error {
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
