package cluster

import (
	"crypto"
	"crypto/elliptic"
	"crypto/x509"
	"maps"
	"net/url"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/peer"
)

func mustAuthority(t *testing.T, now time.Time) *authority {
	t.Helper()
	a, err := newAuthority(now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// holder is a node or router with a certificate: what it shows and trusts.
type holder struct {
	leaf  *x509.Certificate
	trust *x509.CertPool
}

func hold(t *testing.T, a *authority, identity *url.URL, now time.Time) holder {
	t.Helper()
	chain, err := a.issue(newKey(t, elliptic.P256()).Public(), identity, certificateLife, now)
	if err != nil {
		t.Fatal(err)
	}
	all, err := decode(chain)
	if err != nil {
		t.Fatal(err)
	}
	return holder{all[0], poolOf(all[1:])}
}

func (h holder) accepts(other holder, now time.Time) error {
	_, err := other.leaf.Verify(x509.VerifyOptions{Roots: h.trust, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func TestACertificateHasOneNameAndEndsWithItsAuthority(t *testing.T) {
	now := time.Now()
	a := mustAuthority(t, now)
	c := hold(t, a, peer.Node("node-1"), now).leaf
	if len(c.URIs) != 1 || c.URIs[0].String() != "orlop://node/node-1" || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses)+len(c.Subject.Names) > 0 {
		t.Errorf("its names are %v, %v", c.URIs, c.Subject)
	}
	if c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.ExtKeyUsage) != 2 {
		t.Errorf("it is for %v, %v", c.KeyUsage, c.ExtKeyUsage)
	}
	if got := c.NotAfter.Sub(now); got > certificateLife || got < certificateLife-time.Minute {
		t.Errorf("it lives for %s", got)
	}
	late := now.Add(authorityLife - time.Hour)
	if c := hold(t, a, peer.Node("node-1"), late).leaf; c.NotAfter.After(a.signer.certificate.NotAfter) {
		t.Errorf("it outlives its authority by %s", c.NotAfter.Sub(a.signer.certificate.NotAfter))
	}
}

func TestAnAuthorityIsTheSameAfterItWasKept(t *testing.T) {
	now := time.Now()
	a := mustAuthority(t, now)
	for range 3 { // alone, with a successor, with one before it
		data, err := a.data()
		if err != nil {
			t.Fatal(err)
		}
		b, err := parseAuthority(data)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.trusted()) != len(b.trusted()) || (a.successor == nil) != (b.successor == nil) || len(a.former) != len(b.former) {
			t.Fatalf("%d trusted, %d former; was %d, %d", len(b.trusted()), len(b.former), len(a.trusted()), len(a.former))
		}
		for i := range a.trusted() {
			if !a.trusted()[i].Equal(b.trusted()[i]) {
				t.Errorf("certificate %d is another", i)
			}
		}
		if err := hold(t, a, peer.Controller(), now).accepts(hold(t, b, peer.Node("x"), now), now); err != nil {
			t.Errorf("what it signs is not accepted: %v", err)
		}
		now = now.Add(authorityLife - successorLead + time.Hour)
		if a, _, err = b.next(now); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnAuthorityThatIsDamagedIsAnError(t *testing.T) {
	good, err := mustAuthority(t, time.Now()).data()
	if err != nil {
		t.Fatal(err)
	}
	other, err := mustAuthority(t, time.Now()).data()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := mustAuthority(t, time.Now()).keys(peer.Controller(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	leafKey, err := encodeKey(leaf.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(map[string][]byte){
		"no key":              func(d map[string][]byte) { delete(d, "tls.key") },
		"no certificate":      func(d map[string][]byte) { delete(d, "tls.crt") },
		"nobody is trusted":   func(d map[string][]byte) { delete(d, "ca.crt") },
		"another's key":       func(d map[string][]byte) { d["tls.key"] = other["tls.key"] },
		"garbage":             func(d map[string][]byte) { d["tls.crt"] = []byte("garbage") },
		"half a successor":    func(d map[string][]byte) { d["next.crt"] = other["tls.crt"] },
		"not of an authority": func(d map[string][]byte) { d["tls.crt"], d["tls.key"] = encode(leaf.Leaf), leafKey },
	} {
		data := maps.Clone(good)
		change(data)
		if _, err := parseAuthority(data); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A whole cluster through two years, in which the routers look at the
// authority every hour, and each node renews its certificate after two thirds of
// a day: at no time is a node or router refused.
func TestTheAuthorityChangesUnderARunningCluster(t *testing.T) {
	now := time.Now()
	a := mustAuthority(t, now)
	router := hold(t, a, peer.Controller(), now)
	nodes := []holder{hold(t, a, peer.Node("node-0"), now), hold(t, a, peer.Node("node-1"), now)}
	signers := map[string]bool{}
	for hour := range 2 * 365 * 24 {
		now = now.Add(time.Hour)
		next, changed, err := a.next(now)
		if err != nil {
			t.Fatal(err)
		}
		if a = next; changed || hour%20 == 0 {
			router = hold(t, a, peer.Controller(), now)
		}
		signers[a.signer.certificate.Subject.SerialNumber] = true
		for i := range nodes {
			if (hour+5*i)%16 == 0 {
				nodes[i] = hold(t, a, peer.Node("node"), now)
			}
			if !changed && hour%20 != 0 {
				continue // to check is slow
			}
			if err := nodes[i].accepts(router, now); err != nil {
				t.Fatalf("hour %d: node %d refuses the router: %v", hour, i, err)
			}
			if err := (holder{trust: a.pool()}).accepts(nodes[i], now); err != nil {
				t.Fatalf("hour %d: the router refuses node %d: %v", hour, i, err)
			}
		}
		if len(a.trusted()) > 3 {
			t.Fatalf("hour %d: %d authorities are trusted", hour, len(a.trusted()))
		}
	}
	if len(signers) < 3 || len(signers) > 4 {
		t.Errorf("%d authorities have signed in two years", len(signers))
	}
}

func TestAnAuthorityThatEndedWhileNobodyRanIsReplacedAtOnce(t *testing.T) {
	now := time.Now()
	a := mustAuthority(t, now)
	now = now.Add(2 * authorityLife)
	b, changed, err := a.next(now)
	if err != nil || !changed {
		t.Fatalf("changed %v, %v", changed, err)
	}
	if err := hold(t, b, peer.Controller(), now).accepts(hold(t, b, peer.Node("x"), now), now); err != nil {
		t.Error(err)
	}
	if len(b.trusted()) != 1 || b.signer.certificate.Equal(a.signer.certificate) {
		t.Errorf("%d authorities are trusted", len(b.trusted()))
	}
	if _, changed, _ := b.next(now.Add(time.Hour)); changed {
		t.Error("it changes again")
	}
}

func TestTheRoutersOwnKeysWork(t *testing.T) {
	now := time.Now()
	a := mustAuthority(t, now)
	own, err := a.keys(peer.Controller(), now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own.Leaf.Verify(x509.VerifyOptions{Roots: a.pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
}
