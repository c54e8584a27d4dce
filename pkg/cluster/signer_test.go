package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	certificates "k8s.io/api/certificates/v1"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
)

const account = "system:serviceaccount:orlop-system:orlop-node"

func newKey(t *testing.T, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pemRequest(t *testing.T, template x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// asked is a request as a node makes it and the API server hands it on.
func asked(t *testing.T, node string, template x509.CertificateRequest) *certificates.CertificateSigningRequestSpec {
	t.Helper()
	return &certificates.CertificateSigningRequestSpec{
		Request:    pemRequest(t, template, newKey(t, elliptic.P256())),
		SignerName: SignerName,
		Usages:     []certificates.KeyUsage{certificates.UsageServerAuth, certificates.UsageDigitalSignature, certificates.UsageClientAuth},
		Username:   account,
		UID:        "6f1b8f6e",
		Groups:     []string{"system:serviceaccounts", "system:authenticated"},
		Extra: map[string]certificates.ExtraValue{
			"authentication.kubernetes.io/node-name": {node},
			"authentication.kubernetes.io/pod-name":  {"orlop-node-x7x7x"},
		},
	}
}

func forNode(segments ...string) x509.CertificateRequest {
	var r x509.CertificateRequest
	for _, s := range segments {
		r.URIs = append(r.URIs, peer.Node(s))
	}
	return r
}

func TestANodeGetsACertificateForItself(t *testing.T) {
	long := strings.Repeat("a-long-name.", 10) + "example"
	segment, err := pool.NodeSegment(long)
	if err != nil || segment == long {
		t.Fatalf("%s, %v", segment, err)
	}
	for node, segment := range map[string]string{"node-1": "node-1", "n.example.org": "n.example.org", long: segment} {
		_, identity, refused := judge(asked(t, node, forNode(segment)), account)
		if refused != nil || identity.String() != "orlop://node/"+segment {
			t.Errorf("%s: identity %v, refused %v", node, identity, refused)
		}
	}
}

func TestNobodyGetsAnythingElse(t *testing.T) {
	parse := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	named := func(change func(*x509.CertificateRequest)) func(*certificates.CertificateSigningRequestSpec) {
		return func(r *certificates.CertificateSigningRequestSpec) {
			template := forNode("node-1")
			change(&template)
			r.Request = pemRequest(t, template, newKey(t, elliptic.P256()))
		}
	}
	uris := func(all ...string) func(*certificates.CertificateSigningRequestSpec) {
		return named(func(r *x509.CertificateRequest) {
			r.URIs = nil
			for _, u := range all {
				r.URIs = append(r.URIs, parse(u))
			}
		})
	}
	for name, test := range map[string]struct {
		change func(*certificates.CertificateSigningRequestSpec)
		reason string
	}{
		"an administrator":   {func(r *certificates.CertificateSigningRequestSpec) { r.Username = "kubernetes-admin" }, "WrongRequester"},
		"nobody":             {func(r *certificates.CertificateSigningRequestSpec) { r.Username = "" }, "WrongRequester"},
		"the node's kubelet": {func(r *certificates.CertificateSigningRequestSpec) { r.Username = "system:node:node-1" }, "WrongRequester"},
		"that account of another namespace": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Username = "system:serviceaccount:default:orlop-node"
		}, "WrongRequester"},
		"another account of that namespace": {func(r *certificates.CertificateSigningRequestSpec) { r.Username = account + "-2" }, "WrongRequester"},
		"a token of no pod":                 {func(r *certificates.CertificateSigningRequestSpec) { r.Extra = nil }, "NoNodeClaim"},
		"a claim without value":             {func(r *certificates.CertificateSigningRequestSpec) { r.Extra[nodeNameClaim] = nil }, "NoNodeClaim"},
		"an empty claim": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Extra[nodeNameClaim] = certificates.ExtraValue{""}
		}, "NoNodeClaim"},
		"two claims": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Extra[nodeNameClaim] = certificates.ExtraValue{"node-1", "node-2"}
		}, "NoNodeClaim"},
		"a claim that is no name": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Extra[nodeNameClaim] = certificates.ExtraValue{"../node-1"}
		}, "BadNodeName"},
		"a pod on another node": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Extra[nodeNameClaim] = certificates.ExtraValue{"node-2"}
		}, "WrongName"},
		"a claim that only begins so": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Extra[nodeNameClaim] = certificates.ExtraValue{"node-10"}
		}, "WrongName"},
		"no usages":    {func(r *certificates.CertificateSigningRequestSpec) { r.Usages = nil }, "WrongUsages"},
		"a usage less": {func(r *certificates.CertificateSigningRequestSpec) { r.Usages = r.Usages[:2] }, "WrongUsages"},
		"a usage more": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Usages = append(r.Usages, certificates.UsageCertSign)
		}, "WrongUsages"},
		"one usage twice": {func(r *certificates.CertificateSigningRequestSpec) { r.Usages[0] = r.Usages[1] }, "WrongUsages"},
		"another usage":   {func(r *certificates.CertificateSigningRequestSpec) { r.Usages[0] = certificates.UsageCertSign }, "WrongUsages"},
		"nothing":         {func(r *certificates.CertificateSigningRequestSpec) { r.Request = nil }, "BadRequest"},
		"garbage":         {func(r *certificates.CertificateSigningRequestSpec) { r.Request = []byte("garbage") }, "BadRequest"},
		"another kind of PEM": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Request = []byte(strings.ReplaceAll(string(r.Request), "CERTIFICATE REQUEST", "CERTIFICATE"))
		}, "BadRequest"},
		"two requests": {func(r *certificates.CertificateSigningRequestSpec) { r.Request = append(r.Request, r.Request...) }, "BadRequest"},
		"PEM around garbage": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("garbage")})
		}, "BadRequest"},
		"another's public key": {func(r *certificates.CertificateSigningRequestSpec) { r.Request = forged(t, r.Request) }, "BadRequest"},
		"an RSA key": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Request = pemRequest(t, forNode("node-1"), rsaKey(t))
		}, "WrongKey"},
		"another curve": {func(r *certificates.CertificateSigningRequestSpec) {
			r.Request = pemRequest(t, forNode("node-1"), newKey(t, elliptic.P384()))
		}, "WrongKey"},
		"no name":                 {uris(), "WrongName"},
		"another node's name":     {uris("orlop://node/node-2"), "WrongName"},
		"the router's name":       {uris("orlop://controller"), "WrongName"},
		"a name beside its own":   {uris("orlop://node/node-1", "orlop://node/node-2"), "WrongName"},
		"its own name twice":      {uris("orlop://node/node-1", "orlop://node/node-1"), "WrongName"},
		"a query behind its name": {uris("orlop://node/node-1?x"), "WrongName"},
		"its name in capitals":    {uris("orlop://node/NODE-1"), "WrongName"},
		"another scheme":          {uris("https://node/node-1"), "WrongName"},
		"a user in its name":      {uris("orlop://controller@node/node-1"), "WrongName"},
		"a host name":             {named(func(r *x509.CertificateRequest) { r.DNSNames = []string{"node-1"} }), "WrongName"},
		"an address":              {named(func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} }), "WrongName"},
		"a mail address":          {named(func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"a@example.org"} }), "WrongName"},
		"a common name":           {named(func(r *x509.CertificateRequest) { r.Subject = pkix.Name{CommonName: "system:admin"} }), "WrongName"},
		"an organization":         {named(func(r *x509.CertificateRequest) { r.Subject = pkix.Name{Organization: []string{"system:masters"}} }), "WrongName"},
		"to be an authority": {named(func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}}
		}), "WrongExtension"},
		"a key usage through the back door": {named(func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 1, 6}}}
		}), "WrongExtension"},
	} {
		t.Run(name, func(t *testing.T) {
			r := asked(t, "node-1", forNode("node-1"))
			test.change(r)
			request, identity, refused := judge(r, account)
			if refused == nil || request != nil || identity != nil {
				t.Fatalf("it gets a certificate for %v", identity)
			}
			if refused.reason != test.reason || refused.message == "" {
				t.Errorf("refused with %v; want %s", *refused, test.reason)
			}
		})
	}
}

// forged puts another public key into a request, without having its private key.
func forged(t *testing.T, request []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(request)
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	point := func(key any) []byte {
		p, err := key.(*ecdsa.PublicKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	other := strings.Replace(string(block.Bytes), string(point(r.PublicKey)), string(point(newKey(t, elliptic.P256()).Public())), 1)
	if other == string(block.Bytes) {
		t.Fatal("nothing was replaced")
	}
	return pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: []byte(other)})
}

func rsaKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestACertificateIsNeverForLongerThanADay(t *testing.T) {
	seconds := func(n int32) *int32 { return &n }
	for _, test := range []struct {
		asked *int32
		want  time.Duration
	}{
		{nil, 24 * time.Hour},
		{seconds(600), 10 * time.Minute},
		{seconds(86400), 24 * time.Hour},
		{seconds(1 << 30), 24 * time.Hour},
	} {
		if got := life(&certificates.CertificateSigningRequestSpec{ExpirationSeconds: test.asked}); got != test.want {
			t.Errorf("%v: %s, want %s", test.asked, got, test.want)
		}
	}
}
