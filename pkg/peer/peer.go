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
	"strings"
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

// Server is for listening: it accepts the router and the nodes. Which of them
// may do what, [Caller] is for.
func (c *Credentials) Server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAnyClientCert, // and VerifyConnection judges it
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			keys, err := c.current()
			return &keys.Certificate, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			return c.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth, nil)
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
			return c.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth, Node(segment))
		},
	}
}

// verify checks that certificates, the other side's first, are of our
// authority, valid now, for this use, and for the one that is meant; nil is the
// router or any node.
func (c *Credentials) verify(certificates []*x509.Certificate, usage x509.ExtKeyUsage, meant *url.URL) error {
	keys, err := c.current()
	if err != nil {
		return err
	}
	if len(certificates) == 0 {
		return errors.New("the peer shows no certificate")
	}
	leaf, intermediates := certificates[0], x509.NewCertPool()
	for _, certificate := range certificates[1:] {
		intermediates.AddCert(certificate)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: keys.Trust, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return fmt.Errorf("the peer's certificate: %w", err)
	}
	identity, err := identityIn(leaf)
	if err != nil {
		return err
	}
	if meant != nil && identity.String() != meant.String() {
		return fmt.Errorf("the peer is %s, not %s", identity, meant)
	}
	return nil
}

// identityIn reads whose a certificate is. It must be of one.
func identityIn(leaf *x509.Certificate) (*url.URL, error) {
	if len(leaf.URIs) == 1 {
		identity := leaf.URIs[0]
		segment := strings.TrimPrefix(identity.Path, "/")
		for _, known := range []*url.URL{Controller(), Node(segment)} {
			if identity.String() == known.String() && (identity.Host != "node" || segment != "") {
				return identity, nil
			}
		}
	}
	return nil, fmt.Errorf("the peer is %v, which is neither the router nor a node", leaf.URIs)
}

// Caller tells who is at the other end of a connection that [Credentials.Server]
// accepted: the segment of a node, or "" for the router.
func Caller(s tls.ConnectionState) (segment string, err error) {
	if len(s.PeerCertificates) == 0 {
		return "", errors.New("the peer shows no certificate")
	}
	identity, err := identityIn(s.PeerCertificates[0])
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(identity.Path, "/"), nil
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
