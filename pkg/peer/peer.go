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
	"net"
	"net/url"
	"time"
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

// Keys are what one side of a connection shows and what it trusts.
type Keys struct {
	Certificate tls.Certificate // with its key
	Trust       *x509.CertPool  // the authority, or while it changes the authorities
}

// Credentials give TLS configurations for both sides. They are asked for their
// keys at each handshake, so that certificates can be renewed under a process
// that runs.
type Credentials struct {
	current func() (Keys, error)
}

// New makes credentials of keys that change. While current gives an error, no
// handshake succeeds.
func New(current func() (Keys, error)) *Credentials { return &Credentials{current} }

// Expires is when the certificate that is shown now is no longer good; zero if
// there is none.
func (c *Credentials) Expires() time.Time {
	keys, err := c.current()
	if err != nil || keys.Certificate.Leaf == nil {
		return time.Time{}
	}
	return keys.Certificate.Leaf.NotAfter
}

// Server is for listening: it accepts the router and nobody else.
func (c *Credentials) Server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAnyClientCert, // and VerifyConnection judges it
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			keys, err := c.current()
			return &keys.Certificate, err
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
			keys, err := c.current()
			return &keys.Certificate, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			return c.verify(s, Node(segment), x509.ExtKeyUsageServerAuth)
		},
	}
}

// verify checks that the other side has a certificate of our authority, valid
// now, for this use, and for the one that is meant.
func (c *Credentials) verify(s tls.ConnectionState, meant *url.URL, usage x509.ExtKeyUsage) error {
	keys, err := c.current()
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
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: keys.Trust, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return fmt.Errorf("the peer's certificate: %w", err)
	}
	for _, name := range leaf.URIs {
		if name.String() == meant.String() {
			return nil
		}
	}
	return fmt.Errorf("the peer is %v, not %s", leaf.URIs, meant)
}

// Strangers reports whether a handshake failed because the two sides do not know
// each other's authority, as far as this side can tell: either it did not know
// the other's, or the other broke off with an alert, which in TLS 1.3 is all that
// is heard of why.
func Strangers(err error) bool {
	var network *net.OpError
	return errors.As(err, &x509.UnknownAuthorityError{}) ||
		errors.As(err, &network) && network.Op == "remote error" // so package tls marks alerts
}
