package cluster

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"
)

// The lives of certificates.
const (
	// authorityLife is that of an authority.
	authorityLife = 365 * 24 * time.Hour
	// successorLead is how long before an authority's end there is another.
	successorLead = authorityLife / 3
	// certificateLife is that of a node's or router's certificate. Nodes ask
	// for a new one after about two thirds of it.
	certificateLife = 24 * time.Hour
	// successorWait is how long a successor is known before it signs: by then
	// every certificate that is in use was issued with it beside it, so that
	// every node trusts it.
	successorWait = 2 * certificateLife
	// skew is by how much clocks may differ.
	skew = 5 * time.Minute
)

// The keys of the Secret that an authority is kept in. The first three are those
// of every Secret of type kubernetes.io/tls.
const (
	signerCertificate    = "tls.crt"
	signerKey            = "tls.key"
	trustedCertificates  = "ca.crt"
	successorCertificate = "next.crt"
	successorKey         = "next.key"
)

// authority is a certificate authority, with the one that follows it when its
// time is near, and those before it that may still be in use.
type authority struct {
	signer, successor *issuer // the successor may be nil
	former            []*x509.Certificate
}

// issuer is a certificate that signs others, and its key.
type issuer struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

func newIssuer(now time.Time) (*issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "Orlop peers", SerialNumber: rand.Text()[:10]},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	certificate, err := sign(template, template, key.Public(), key)
	return &issuer{certificate, key}, err
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newAuthority makes an authority.
func newAuthority(now time.Time) (*authority, error) {
	signer, err := newIssuer(now)
	return &authority{signer: signer}, err
}

// trusted is all authorities whose certificates are good now.
func (a *authority) trusted() []*x509.Certificate {
	all := []*x509.Certificate{a.signer.certificate}
	if a.successor != nil {
		all = append(all, a.successor.certificate)
	}
	return append(all, a.former...)
}

// pool is trusted, for checking.
func (a *authority) pool() *x509.CertPool { return poolOf(a.trusted()) }

func poolOf(certificates []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certificates {
		p.AddCert(c)
	}
	return p
}

// next gives the authority as it should be at that time, and whether that is
// another: with a successor when its end is near, with the successor in its
// place when all have come to know that one, and without former ones that have
// ended.
func (a *authority) next(now time.Time) (*authority, bool, error) {
	n, changed := &authority{signer: a.signer, successor: a.successor}, false
	for _, c := range a.former {
		if now.Before(c.NotAfter) {
			n.former = append(n.former, c)
		} else {
			changed = true
		}
	}
	if n.successor == nil && now.After(n.signer.certificate.NotAfter.Add(-successorLead)) {
		var err error
		if n.successor, err = newIssuer(now); err != nil {
			return nil, false, err
		}
		changed = true
	}
	ended := now.After(n.signer.certificate.NotAfter)
	if n.successor != nil && (ended || now.After(n.successor.certificate.NotBefore.Add(skew+successorWait))) {
		if !ended {
			n.former = append(n.former, n.signer.certificate)
		}
		n.signer, n.successor, changed = n.successor, nil, true
	}
	return n, changed, nil
}

// issue makes a certificate, for both ends of a connection, with that identity
// and no other name, and gives it in PEM with the trusted authorities behind it.
func (a *authority) issue(public crypto.PublicKey, identity *url.URL, life time.Duration, now time.Time) ([]byte, error) {
	template := &x509.Certificate{
		NotBefore:             now.Add(-skew),
		NotAfter:              earlier(now.Add(life), a.signer.certificate.NotAfter),
		URIs:                  []*url.URL{identity},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	certificate, err := sign(template, a.signer.certificate, public, a.signer.key)
	if err != nil {
		return nil, err
	}
	return encode(append([]*x509.Certificate{certificate}, a.trusted()...)...), nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// keys issues a certificate for a key of its own that nobody else gets to see.
func (a *authority) keys(identity *url.URL, now time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	chain, err := a.issue(key.Public(), identity, certificateLife, now)
	if err != nil {
		return tls.Certificate{}, err
	}
	secret, err := encodeKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(chain, secret)
}

// data is the authority as a Secret has it.
func (a *authority) data() (map[string][]byte, error) {
	key, err := encodeKey(a.signer.key)
	if err != nil {
		return nil, err
	}
	data := map[string][]byte{
		signerCertificate:   encode(a.signer.certificate),
		signerKey:           key,
		trustedCertificates: encode(a.trusted()...),
	}
	if a.successor != nil {
		if data[successorKey], err = encodeKey(a.successor.key); err != nil {
			return nil, err
		}
		data[successorCertificate] = encode(a.successor.certificate)
	}
	return data, nil
}

// parseAuthority reads what data wrote.
func parseAuthority(data map[string][]byte) (*authority, error) {
	a := &authority{}
	var err error
	if a.signer, err = parseIssuer(data, signerCertificate, signerKey); err != nil {
		return nil, err
	}
	if len(data[successorCertificate]) > 0 {
		if a.successor, err = parseIssuer(data, successorCertificate, successorKey); err != nil {
			return nil, err
		}
	}
	trusted, err := decode(data[trustedCertificates])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", trustedCertificates, err)
	}
	for _, c := range trusted {
		if !c.Equal(a.signer.certificate) && (a.successor == nil || !c.Equal(a.successor.certificate)) {
			a.former = append(a.former, c)
		}
	}
	return a, nil
}

func parseIssuer(data map[string][]byte, certificateName, keyName string) (*issuer, error) {
	pair, err := tls.X509KeyPair(data[certificateName], data[keyName])
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", certificateName, keyName, err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("%s is not the certificate of an authority", certificateName)
	}
	return &issuer{pair.Leaf, key}, nil
}

func encode(certificates ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certificates {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // to memory
	}
	return b.Bytes()
}

func decode(text []byte) (certificates []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, c)
	}
	if len(certificates) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return certificates, nil
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
