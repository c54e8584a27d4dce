package peer_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/tests/harness"
)

var (
	later  = time.Now().Add(time.Hour)
	before = time.Now().Add(-time.Hour)
)

// issued gives fresh credentials of one identity.
func issued(t *testing.T, a *harness.Authority, identity *url.URL, until time.Time) *peer.Credentials {
	t.Helper()
	dir := t.TempDir()
	a.Issue(dir, identity, until)
	c, err := peer.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// connect lets one side call the other and gives what each saw.
func connect(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			ended <- err
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err = c.Read(make([]byte, 1)); err == nil {
			_, err = c.Write([]byte("!"))
		}
		ended <- err
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), client)
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err = c.Write([]byte("?")); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
	}
	return err, <-ended
}

func TestRouterAndNodeAcceptEachOther(t *testing.T) {
	a := harness.NewAuthority(t)
	router, node := issued(t, a, peer.Controller(), later), issued(t, a, peer.Node("node-1"), later)
	if clientErr, serverErr := connect(t, router.Client("node-1"), node.Server()); clientErr != nil || serverErr != nil {
		t.Errorf("client: %v, server: %v", clientErr, serverErr)
	}
}

func TestANodeAcceptsTheRouterAndNodes(t *testing.T) {
	a := harness.NewAuthority(t)
	node := issued(t, a, peer.Node("node-1"), later)
	for name, test := range map[string]struct {
		client *tls.Config
		want   string // of what the node says
	}{
		"no certificate":         {&tls.Config{InsecureSkipVerify: true}, "certificate"},
		"another authority":      {issued(t, harness.NewAuthority(t), peer.Controller(), later).Client("node-1"), ""},
		"an expired certificate": {issued(t, a, peer.Controller(), before).Client("node-1"), "expired"},
		"somebody else":          {issued(t, a, &url.URL{Scheme: peer.Scheme, Host: "backup"}, later).Client("node-1"), "neither the router nor a node"},
		"a node without a name":  {issued(t, a, peer.Node(""), later).Client("node-1"), "neither the router nor a node"},
		"an old TLS":             {&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, "unsupported"},
	} {
		t.Run(name, func(t *testing.T) {
			clientErr, serverErr := connect(t, test.client, node.Server())
			if clientErr == nil || serverErr == nil {
				t.Fatalf("accepted; client: %v, server: %v", clientErr, serverErr)
			}
			if !strings.Contains(serverErr.Error(), test.want) {
				t.Errorf("the node says %v; want %q", serverErr, test.want)
			}
		})
	}
}

func TestANodeKnowsWhoCalls(t *testing.T) {
	a := harness.NewAuthority(t)
	node := issued(t, a, peer.Node("node-1"), later)
	for want, client := range map[string]*peer.Credentials{
		"":       issued(t, a, peer.Controller(), later),
		"node-2": issued(t, a, peer.Node("node-2"), later),
	} {
		config, got := node.Server(), "nobody"
		verify := config.VerifyConnection
		config.VerifyConnection = func(s tls.ConnectionState) (err error) {
			if err := verify(s); err != nil {
				return err
			}
			got, err = peer.Caller(s)
			return err
		}
		if clientErr, serverErr := connect(t, client.Client("node-1"), config); clientErr != nil || serverErr != nil || got != want {
			t.Errorf("%q calls, and is taken for %q; client: %v, server: %v", want, got, clientErr, serverErr)
		}
	}
}

func TestTheRouterAcceptsOnlyTheNodeThatItMeant(t *testing.T) {
	a := harness.NewAuthority(t)
	router := issued(t, a, peer.Controller(), later)
	for name, test := range map[string]struct {
		server *peer.Credentials
		want   string
	}{
		"another node":           {issued(t, a, peer.Node("node-2"), later), "orlop://node/node-2"},
		"a name that begins so":  {issued(t, a, peer.Node("node-10"), later), "orlop://node/node-10"},
		"a router":               {issued(t, a, peer.Controller(), later), "orlop://controller"},
		"another authority":      {issued(t, harness.NewAuthority(t), peer.Node("node-1"), later), "authority"},
		"an expired certificate": {issued(t, a, peer.Node("node-1"), before), "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			clientErr, _ := connect(t, router.Client("node-1"), test.server.Server())
			if clientErr == nil || !strings.Contains(clientErr.Error(), test.want) {
				t.Errorf("the router says %v; want %q", clientErr, test.want)
			}
		})
	}
}

func TestRenewedCredentialsAreUsedWithoutARestart(t *testing.T) {
	a := harness.NewAuthority(t)
	dir := t.TempDir()
	a.Issue(dir, peer.Node("node-1"), before)
	node, err := peer.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	router := issued(t, a, peer.Controller(), later)
	server := node.Server()
	if clientErr, _ := connect(t, router.Client("node-1"), server); clientErr == nil {
		t.Fatal("an expired certificate was accepted")
	}
	a.Issue(dir, peer.Node("node-1"), later)
	if clientErr, serverErr := connect(t, router.Client("node-1"), server); clientErr != nil || serverErr != nil {
		t.Errorf("client: %v, server: %v", clientErr, serverErr)
	}
	// While they are being replaced, those from before go on.
	if err := os.WriteFile(filepath.Join(dir, "tls.key"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if clientErr, serverErr := connect(t, router.Client("node-1"), server); clientErr != nil || serverErr != nil {
		t.Errorf("client: %v, server: %v", clientErr, serverErr)
	}
}

func TestLoadSaysWhatIsMissing(t *testing.T) {
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt"} {
		dir := t.TempDir()
		harness.NewAuthority(t).Issue(dir, peer.Controller(), later)
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.Load(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.Load(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("with a bad %s: %v", name, err)
		}
	}
}

func TestItIsSeenWhenTheAuthorityIsAnother(t *testing.T) {
	a, other := harness.NewAuthority(t), harness.NewAuthority(t)
	node := issued(t, a, peer.Node("node-1"), later)
	trusting := issued(t, other, peer.Controller(), later).Client("node-1") // it looks at nothing, and shows its certificate
	trusting.VerifyConnection = nil
	for name, test := range map[string]struct {
		client *tls.Config
		want   bool
	}{
		"the router's is, and it breaks off":     {issued(t, other, peer.Controller(), later).Client("node-1"), true},
		"the router's is, and the node sees it":  {trusting, true},
		"the same, but it is a node that calls":  {issued(t, a, peer.Node("node-2"), later).Client("node-1"), false},
		"the same, but the certificate is ended": {issued(t, a, peer.Controller(), before).Client("node-1"), false},
		"no certificate is shown":                {&tls.Config{InsecureSkipVerify: true}, false},
		"all is well":                            {issued(t, a, peer.Controller(), later).Client("node-1"), false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, serverErr := connect(t, test.client, node.Server()); peer.Strangers(serverErr) != test.want {
				t.Errorf("the node says %v", serverErr)
			}
		})
	}
	t.Run("somebody looks whether the port is open", func(t *testing.T) {
		client, server := net.Pipe()
		client.Close()
		if err := tls.Server(server, node.Server()).Handshake(); err == nil || peer.Strangers(err) {
			t.Errorf("the node says %v", err)
		}
	})
}

func TestACertificateForServersIsNoRouters(t *testing.T) {
	a := harness.NewAuthority(t)
	node := issued(t, a, peer.Node("node-1"), later)
	dir := t.TempDir()
	a.Issue(dir, peer.Controller(), later, x509.ExtKeyUsageServerAuth)
	c, err := peer.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	clientErr, serverErr := connect(t, c.Client("node-1"), node.Server())
	if clientErr == nil || serverErr == nil || !strings.Contains(serverErr.Error(), "usage") {
		t.Errorf("client: %v, server: %v", clientErr, serverErr)
	}
}
