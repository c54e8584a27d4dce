package peer_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/tests/harness"
)

func TestATicketIsGoodIfARouterOfTheAuthoritySignedItAndItHasNotExpired(t *testing.T) {
	a := harness.NewAuthority(t)
	router, node := issued(t, a, peer.Controller(), later), issued(t, a, peer.Node("node-1"), later)
	want := peer.Ticket{Snapshot: "node-1/pool/snapshot", Reader: "node-2", Expires: time.Now().Add(time.Minute).UTC().Truncate(time.Second)}
	sign := func(c *peer.Credentials, change ...func(*peer.Ticket)) []byte {
		t.Helper()
		ticket := want
		for _, f := range change {
			f(&ticket)
		}
		signed, err := c.Sign(ticket)
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	good := sign(router)
	if got, err := node.Redeem(good, time.Now()); err != nil || got != want {
		t.Fatalf("%v, %v; want %v", got, err, want)
	}
	for name, bad := range map[string]struct {
		signed []byte
		want   string
	}{
		"nothing":                 {nil, "not a ticket"},
		"no certificates":         {[]byte(`{"ticket":{}}`), "no certificate"},
		"of a node":               {sign(issued(t, a, peer.Node("node-2"), later)), "not orlop://controller"},
		"of another authority":    {sign(issued(t, harness.NewAuthority(t), peer.Controller(), later)), "authority"},
		"of a router of the past": {sign(issued(t, a, peer.Controller(), before)), "expired"},
		"expired":                 {sign(router, func(t *peer.Ticket) { t.Expires = before }), "good until"},
		"for another reader":      {bytes.Replace(good, []byte("node-2"), []byte("node-3"), 1), "signature"},
		"for another snapshot":    {bytes.Replace(good, []byte("pool/snapshot"), []byte("pool/another_"), 1), "signature"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := node.Redeem(bad.signed, time.Now()); err == nil || !strings.Contains(err.Error(), bad.want) {
				t.Errorf("%v, %v; want %q", got, err, bad.want)
			}
		})
	}
}
