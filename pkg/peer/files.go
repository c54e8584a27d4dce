package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The files of a directory of credentials, named as in a Kubernetes Secret of
// type kubernetes.io/tls with its authority.
const (
	certificateFile = "tls.crt"
	keyFile         = "tls.key"
	authorityFile   = "ca.crt"
)

// files are keys in a directory. They are read anew when the files have changed.
type files struct {
	dir string

	mu     sync.Mutex
	stamps [3]stamp
	keys   Keys
}

// stamp tells one state of a file from another.
type stamp struct {
	modified time.Time
	size     int64
}

// Load reads the credentials in a directory: tls.crt, tls.key and ca.crt, in
// PEM.
func Load(dir string) (*Credentials, error) {
	f := &files{dir: dir}
	_, err := f.current()
	return New(f.current), err
}

// current gives the keys as they are in the files now. While the files cannot
// be read, or do not fit together because they are just being replaced, those
// that were read before go on being used.
func (f *files) current() (Keys, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	stamps, err := f.look()
	if err == nil && stamps != f.stamps {
		err = f.read()
		if err == nil {
			f.stamps = stamps
		}
	}
	if err != nil && f.keys.Trust == nil {
		return Keys{}, err
	}
	return f.keys, nil
}

func (f *files) look() (stamps [3]stamp, err error) {
	for i, name := range []string{certificateFile, keyFile, authorityFile} {
		info, err := os.Stat(filepath.Join(f.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return stamps, fmt.Errorf("%s has no %s; it needs %s, %s and %s", f.dir, name, certificateFile, keyFile, authorityFile)
		}
		if err != nil {
			return stamps, err
		}
		stamps[i] = stamp{info.ModTime(), info.Size()}
	}
	return stamps, nil
}

func (f *files) read() error {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(f.dir, certificateFile), filepath.Join(f.dir, keyFile))
	if err != nil {
		return fmt.Errorf("%s and %s in %s: %w", certificateFile, keyFile, f.dir, err)
	}
	authority, err := os.ReadFile(filepath.Join(f.dir, authorityFile))
	if err != nil {
		return err
	}
	trust := x509.NewCertPool()
	if !trust.AppendCertsFromPEM(authority) {
		return fmt.Errorf("%s in %s holds no certificate", authorityFile, f.dir)
	}
	f.keys = Keys{certificate, trust}
	return nil
}
