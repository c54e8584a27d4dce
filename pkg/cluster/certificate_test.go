package cluster

import (
	"crypto/elliptic"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/peer"
)

// keep writes a node's file as if it had been issued for that name.
func keep(t *testing.T, dir string, a *authority, segment string, life time.Duration, now time.Time) {
	t.Helper()
	key := newKey(t, elliptic.P256())
	chain, err := a.issue(key.Public(), peer.Node(segment), life, now)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(dir, "peer.pem"), slices.Concat(secret, chain)); err != nil {
		t.Fatal(err)
	}
}

func TestARestartNeedsNoNewCertificate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "tls")
	a := mustAuthority(t, time.Now())
	keep(t, dir, a, "node-1", certificateLife, time.Now())
	info, err := os.Stat(filepath.Join(dir, "peer.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; only root may read the key", info.Mode(), err)
	}
	n := (&Client{}).Certificate("node-1", dir, func(message string, err error, _ ...any) { t.Errorf("%s: %v", message, err) })
	keys, err := n.Keys()
	if err != nil || keys.Certificate.Leaf.URIs[0].String() != "orlop://node/node-1" {
		t.Fatalf("%v, %v", keys.Certificate.Leaf, err)
	}
	if left := time.Until(n.due()); left < certificateLife/2 || left > certificateLife*3/4 {
		t.Errorf("it is renewed in %s", left)
	}
	// It trusts the router of its authority, and no other.
	for want, other := range map[bool]*authority{true: a, false: mustAuthority(t, time.Now())} {
		err := holder{trust: keys.Trust}.accepts(hold(t, other, peer.Controller(), time.Now()), time.Now())
		if (err == nil) != want {
			t.Errorf("accepted %v; want %v", err, want)
		}
	}
}

func TestACertificateThatIsOfNoUseIsNotUsed(t *testing.T) {
	now := time.Now()
	for name, spoil := range map[string]func(dir string){
		"none":         func(string) {},
		"another node": func(dir string) { keep(t, dir, mustAuthority(t, now), "node-2", certificateLife, now) },
		"ended": func(dir string) {
			past := now.Add(-48 * time.Hour)
			keep(t, dir, mustAuthority(t, past), "node-1", certificateLife, past)
		},
		"garbage": func(dir string) {
			if err := write(filepath.Join(dir, "peer.pem"), []byte("garbage")); err != nil {
				t.Fatal(err)
			}
		},
		"no authority with it": func(dir string) {
			keep(t, dir, mustAuthority(t, now), "node-1", certificateLife, now)
			all, err := os.ReadFile(filepath.Join(dir, "peer.pem"))
			if err != nil {
				t.Fatal(err)
			}
			pair, err := parsePair(all)
			if err != nil {
				t.Fatal(err)
			}
			if err := write(filepath.Join(dir, "peer.pem"), slices.Concat(all[:len(all)-len(encode(pair.Leaf))], nil)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			spoil(dir)
			var told error
			n := (&Client{}).Certificate("node-1", dir, func(_ string, err error, _ ...any) { told = errors.Join(told, err) })
			if _, err := n.Keys(); err == nil {
				t.Error("it is used")
			}
			if (told == nil) != (name == "none") {
				t.Errorf("told %v", told)
			}
			if !n.due().Before(now) {
				t.Error("it does not ask for another at once")
			}
		})
	}
}
