package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	certificates "k8s.io/api/certificates/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/orlop-csi/orlop/pkg/peer"
)

// Certificate is a node's certificate and key, which it asks the router for
// through the CertificateSigningRequest API, and renews in time. They are kept
// in a file, so that a restart needs no new one. The service account needs to
// create and watch certificate requests, and nothing else.
//
// It is what the client library's certificate manager does, which would bring
// all API groups into every node's memory (see the package's comment), lists
// requests where watching one is enough, and cannot be told that the authority
// has changed.
type Certificate struct {
	client   *Client
	identity *url.URL
	file     string
	report   Report
	renew    chan struct{}

	mu   sync.Mutex
	keys peer.Keys
}

// The times of renewing.
const (
	// leastAge is the age of a certificate before which it is not renewed for
	// that a peer refuses it: peers can be anybody.
	leastAge = time.Minute
	// The delays between failing requests.
	firstRetry = time.Second
	lastRetry  = 2 * time.Minute
)

// Certificate prepares the certificate of the node with that topology segment,
// and reads what is in the directory. Nobody is asked before it runs.
func (c *Client) Certificate(segment, dir string, report Report) *Certificate {
	n := &Certificate{
		client:   c,
		identity: peer.Node(segment),
		file:     filepath.Join(dir, "peer.pem"),
		report:   report,
		renew:    make(chan struct{}, 1),
	}
	kept, err := os.ReadFile(n.file)
	if err == nil {
		err = n.take(kept, time.Now())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		report("The certificate that was kept is of no use; another is asked for", err, "file", n.file)
	}
	return n
}

// Keys is what the node shows and trusts, for [peer.New].
func (n *Certificate) Keys() (peer.Keys, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch leaf := n.keys.Certificate.Leaf; {
	case leaf == nil:
		return peer.Keys{}, errors.New("this node has no certificate for the router yet; it is waiting for one")
	case time.Now().After(leaf.NotAfter):
		return peer.Keys{}, fmt.Errorf("this node's certificate for the router ended at %s; it is waiting for another", leaf.NotAfter.Format(time.RFC3339))
	}
	return n.keys, nil
}

// Renew has the certificate renewed before its time, unless that was just done.
// It is for when a handshake fails, which it does if the authority was replaced.
func (n *Certificate) Renew() {
	select {
	case n.renew <- struct{}{}:
	default:
	}
}

// Run asks for a certificate whenever one is needed, until ctx is done.
func (n *Certificate) Run(ctx context.Context) error {
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Until(n.due())):
		case <-n.renew:
			if n.age() < leastAge {
				continue
			}
		}
		err := n.request(ctx)
		if err == nil {
			failures = 0
			n.report("A certificate was received", nil, "identity", n.identity.String(), "until", n.until())
			continue
		}
		if ctx.Err() == nil {
			n.report("Asking for a certificate", err, "identity", n.identity.String())
		}
		delay := min(firstRetry<<min(failures, 10), lastRetry)
		failures++
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay/2 + random(delay/2)):
		}
	}
}

// due is when the certificate is to be renewed: when two thirds of its life are
// over, give or take a little, so that nodes do not ask all at once for ever.
func (n *Certificate) due() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	leaf := n.keys.Certificate.Leaf
	if leaf == nil {
		return time.Time{}
	}
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	return leaf.NotBefore.Add(life*6/10 + random(life/8))
}

func random(most time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(most)+1))
	if err != nil {
		return most
	}
	return time.Duration(n.Int64())
}

func (n *Certificate) age() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.keys.Certificate.Leaf == nil {
		return leastAge
	}
	return time.Since(n.keys.Certificate.Leaf.NotBefore.Add(skew))
}

func (n *Certificate) until() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.keys.Certificate.Leaf.NotAfter
}

// request asks for a certificate for a fresh key, and waits for it.
func (n *Certificate) request(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{n.identity}}, key)
	if err != nil {
		return err
	}
	seconds := int32(certificateLife / time.Second)
	request := &certificates.CertificateSigningRequest{
		ObjectMeta: meta.ObjectMeta{GenerateName: "orlop-peer-", Labels: ourLabels},
		Spec: certificates.CertificateSigningRequestSpec{
			Request:           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName:        SignerName,
			Usages:            usages,
			ExpirationSeconds: &seconds,
		},
	}
	if err := n.client.certificates.Post().Resource("certificatesigningrequests").Body(request).Do(ctx).Into(request); err != nil {
		return err
	}
	chain, err := n.client.issued(ctx, request.Name)
	if err != nil {
		return fmt.Errorf("certificate request %s: %w", request.Name, err)
	}
	secret, err := encodeKey(key)
	if err != nil {
		return err
	}
	both := slices.Concat(secret, chain)
	if err := n.take(both, time.Now()); err != nil {
		return fmt.Errorf("the certificate that was issued for request %s: %w", request.Name, err)
	}
	if err := write(n.file, both); err != nil { // it is good while this process lives
		n.report("The certificate cannot be kept; the next start must ask for another", err, "file", n.file)
	}
	return nil
}

// issued waits until a request is decided on. It may wait for long: when no
// router runs, there is nobody to decide.
func (c *Client) issued(ctx context.Context, name string) ([]byte, error) {
	for {
		chain, err := c.watchOnce(ctx, name)
		if chain != nil || err != nil {
			return chain, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// watchOnce watches a request until the API server ends that, as it does now and
// then. It begins with the state that the request is in.
func (c *Client) watchOnce(ctx context.Context, name string) ([]byte, error) {
	options := &meta.ListOptions{Watch: true}
	named(name)(options)
	w, err := c.certificates.Get().Resource("certificatesigningrequests").VersionedParams(options, meta.ParameterCodec).Watch(ctx)
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		r, ok := event.Object.(*certificates.CertificateSigningRequest)
		switch {
		case event.Type == watch.Deleted:
			return nil, errors.New("it was deleted before it was signed")
		case event.Type == watch.Error || !ok:
			return nil, fmt.Errorf("watching: %v", event.Object)
		}
		for _, condition := range r.Status.Conditions {
			if condition.Type == certificates.CertificateDenied || condition.Type == certificates.CertificateFailed {
				return nil, fmt.Errorf("%s: %s: %s", condition.Type, condition.Reason, condition.Message)
			}
		}
		if len(r.Status.Certificate) > 0 {
			return r.Status.Certificate, nil
		}
	}
	return nil, nil
}

// take takes a key with its certificate and the authorities that follow it into
// use, if they are what they should be.
func (n *Certificate) take(text []byte, now time.Time) error {
	pair, err := parsePair(text)
	if err != nil {
		return err
	}
	var authorities []*x509.Certificate
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if c.IsCA {
			authorities = append(authorities, c)
		}
	}
	trust := poolOf(authorities)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: trust, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	if len(pair.Leaf.URIs) != 1 || pair.Leaf.URIs[0].String() != n.identity.String() {
		return fmt.Errorf("it is for %v, not for %s", pair.Leaf.URIs, n.identity)
	}
	pair.Certificate = pair.Certificate[:1] // who is called trusts the authority, or does not
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keys = peer.Keys{Certificate: pair, Trust: trust}
	return nil
}

// parsePair reads a key and a chain of certificates.
func parsePair(text []byte) (tls.Certificate, error) {
	return tls.X509KeyPair(text, text)
}

// write replaces a file that this user alone can read, as a whole.
func write(path string, content []byte) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
