// Package peer is the connection between the router and the nodes: TLS 1.3 in
// which both sides show a certificate of the same authority, with who they are
// in it. There is no way to turn that off.
//
// It knows certificates and names, and nothing of what is said over the
// connection.
package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
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

// Scheme is that of the URI by which a certificate tells whose it is, in its
// subject alternative names (RFC 5280, section 4.2.1.6).
const Scheme = "orlop"

// Controller is the router's identity.
func Controller() *url.URL { return &url.URL{Scheme: Scheme, Host: "controller"} }

// Node is the identity of the node with that topology segment.
func Node(segment string) *url.URL {
	return &url.URL{Scheme: Scheme, Host: "node", Path: "/" + segment}
}

// Credentials are a certificate, its key, and the authority that both sides
// trust. They are read anew for a handshake when their files have changed, so
// that certificates can be renewed under a process that runs.
type Credentials struct {
	dir string

	mu     sync.Mutex
	stamps [3]stamp
	keys   tls.Certificate
	trust  *x509.CertPool
}

// stamp tells one state of a file from another.
type stamp struct {
	modified time.Time
	size     int64
}

// Load reads the credentials in a directory: tls.crt, tls.key and ca.crt, in
// PEM.
func Load(dir string) (*Credentials, error) {
	c := &Credentials{dir: dir}
	_, _, err := c.current()
	return c, err
}

// current gives the credentials as they are in the files now. While the files
// cannot be read, or do not fit together because they are just being replaced,
// those that were read before go on being used.
func (c *Credentials) current() (tls.Certificate, *x509.CertPool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamps, err := c.look()
	if err == nil && stamps != c.stamps {
		err = c.read()
		if err == nil {
			c.stamps = stamps
		}
	}
	if err != nil && c.trust == nil {
		return tls.Certificate{}, nil, err
	}
	return c.keys, c.trust, nil
}

func (c *Credentials) look() (stamps [3]stamp, err error) {
	for i, name := range []string{certificateFile, keyFile, authorityFile} {
		info, err := os.Stat(filepath.Join(c.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return stamps, fmt.Errorf("%s has no %s; it needs %s, %s and %s", c.dir, name, certificateFile, keyFile, authorityFile)
		}
		if err != nil {
			return stamps, err
		}
		stamps[i] = stamp{info.ModTime(), info.Size()}
	}
	return stamps, nil
}

func (c *Credentials) read() error {
	keys, err := tls.LoadX509KeyPair(filepath.Join(c.dir, certificateFile), filepath.Join(c.dir, keyFile))
	if err != nil {
		return fmt.Errorf("%s and %s in %s: %w", certificateFile, keyFile, c.dir, err)
	}
	authority, err := os.ReadFile(filepath.Join(c.dir, authorityFile))
	if err != nil {
		return err
	}
	trust := x509.NewCertPool()
	if !trust.AppendCertsFromPEM(authority) {
		return fmt.Errorf("%s in %s holds no certificate", authorityFile, c.dir)
	}
	c.keys, c.trust = keys, trust
	return nil
}

// Server is for listening: it accepts the router and nobody else.
func (c *Credentials) Server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAnyClientCert, // and VerifyConnection judges it
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			keys, _, err := c.current()
			return &keys, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			return c.verify(s, Controller(), x509.ExtKeyUsageClientAuth)
		},
	}
}

// Client is for connecting to one node: it accepts that node and no other.
func (c *Credentials) Client(segment string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The standard check is of host names. Who is meant is a node,
		// wherever it is reached; VerifyConnection checks that and the
		// chain, on every handshake.
		InsecureSkipVerify: true, //nolint:gosec // see above
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			keys, _, err := c.current()
			return &keys, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			return c.verify(s, Node(segment), x509.ExtKeyUsageServerAuth)
		},
	}
}

// verify checks that the other side has a certificate of our authority, valid
// now, for this use, and for the one that is meant.
func (c *Credentials) verify(s tls.ConnectionState, meant *url.URL, usage x509.ExtKeyUsage) error {
	_, trust, err := c.current()
	if err != nil {
		return err
	}
	if len(s.PeerCertificates) == 0 {
		return errors.New("the peer shows no certificate")
	}
	leaf, intermediates := s.PeerCertificates[0], x509.NewCertPool()
	for _, certificate := range s.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: trust, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return fmt.Errorf("the peer's certificate: %w", err)
	}
	for _, name := range leaf.URIs {
		if name.String() == meant.String() {
			return nil
		}
	}
	return fmt.Errorf("the peer is %v, not %s", leaf.URIs, meant)
}
