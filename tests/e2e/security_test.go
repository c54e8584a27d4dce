package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	authentication "k8s.io/api/authentication/v1"
	authorization "k8s.io/api/authorization/v1"
	certificates "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

const peerSigner = "orlop.dev/peer"

// nodeAccount gives a client with the rights of the driver on a node: with a
// token such as the kubelet gives to its pod.
func nodeAccount(t testing.TB, node string) *kubernetes.Clientset {
	t.Helper()
	pod, err := kube.CoreV1().Pods(system).Get(context.Background(), nodePod(t, node), getNow)
	must(t, err)
	return account(t, system, nodeSet, &authentication.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID})
}

// account gives a client with the rights of a service account.
func account(t testing.TB, namespace, name string, bound *authentication.BoundObjectReference) *kubernetes.Clientset {
	t.Helper()
	token, err := kube.CoreV1().ServiceAccounts(namespace).CreateToken(context.Background(), name,
		&authentication.TokenRequest{Spec: authentication.TokenRequestSpec{BoundObjectRef: bound}}, metav1.CreateOptions{})
	must(t, err)
	config := rest.AnonymousClientConfig(admin)
	config.BearerToken = token.Status.Token
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	must(t, err)
	return client
}

// rules lists what a client may do in the driver's namespace, as `kubectl auth
// can-i --list` does.
func rules(t testing.TB, client *kubernetes.Clientset) (all []string) {
	t.Helper()
	review, err := client.AuthorizationV1().SelfSubjectRulesReviews().Create(context.Background(),
		&authorization.SelfSubjectRulesReview{Spec: authorization.SelfSubjectRulesReviewSpec{Namespace: system}}, metav1.CreateOptions{})
	must(t, err)
	if review.Status.Incomplete {
		t.Fatalf("the list of rules is incomplete: %s", review.Status.EvaluationError)
	}
	for _, r := range review.Status.ResourceRules {
		for _, verb := range r.Verbs {
			for _, resource := range r.Resources {
				all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s.%s %s", verb, resource, strings.Join(r.APIGroups, ","), strings.Join(r.ResourceNames, ","))))
			}
		}
	}
	for _, r := range review.Status.NonResourceRules {
		for _, verb := range r.Verbs {
			for _, path := range r.NonResourceURLs {
				all = append(all, verb+" "+path)
			}
		}
	}
	return all
}

// The driver on a node can ask for a certificate, and can do nothing else with
// the cluster: not read a secret, a pod, or a volume; not change its own node.
func TestNodeAccountCanDoNothing(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	client := nodeAccount(t, nodes[0])

	nobody := rules(t, account(t, s.name, "default", nil)) // what everybody may, such as to ask what one may
	var more []string
	for _, r := range rules(t, client) {
		if !slices.Contains(nobody, r) {
			more = append(more, r)
		}
	}
	const csr = "certificatesigningrequests.certificates.k8s.io"
	for _, r := range more {
		if verb, of, _ := strings.Cut(r, " "); of != csr || !slices.Contains([]string{"create", "get", "list", "watch"}, verb) {
			t.Errorf("a node may %s", r)
		}
	}
	if !slices.Contains(more, "create "+csr) {
		t.Errorf("a node cannot ask for a certificate; it may %q", more)
	}

	ctx, list := context.Background(), metav1.ListOptions{}
	patchIt := []byte(`{"metadata":{"annotations":{"e2e":"tried"}}}`)
	victim := newRequest(t, "e2e-victim-"+stamp(), peerSigner, "orlop://node/"+nodes[0])
	core := client.CoreV1()
	attempts := map[string]func() error{
		"read the authority's key": func() error { _, err := core.Secrets(system).Get(ctx, "orlop-ca", getNow); return err },
		"list secrets":             func() error { _, err := core.Secrets(system).List(ctx, list); return err },
		"list all secrets":         func() error { _, err := core.Secrets("").List(ctx, list); return err },
		"read its configuration":   func() error { _, err := core.ConfigMaps(system).List(ctx, list); return err },
		"list pods":                func() error { _, err := core.Pods("").List(ctx, list); return err },
		"make a pod": func() error {
			_, err := core.Pods(system).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "e2e"}, Spec: corev1.PodSpec{
				Containers: []corev1.Container{{Name: "main", Image: *image}}}}, metav1.CreateOptions{DryRun: []string{"All"}})
			return err
		},
		"read its node": func() error { _, err := core.Nodes().Get(ctx, nodes[0], getNow); return err },
		"change its node": func() error {
			_, err := core.Nodes().Patch(ctx, nodes[0], types.MergePatchType, patchIt, metav1.PatchOptions{})
			return err
		},
		"list volumes": func() error { _, err := core.PersistentVolumes().List(ctx, list); return err },
		"list claims":  func() error { _, err := core.PersistentVolumeClaims("").List(ctx, list); return err },
		"delete all volumes": func() error {
			return core.PersistentVolumes().DeleteCollection(ctx, metav1.DeleteOptions{DryRun: []string{"All"}}, list)
		},
		"read the room on nodes": func() error { _, err := client.StorageV1().CSIStorageCapacities(system).List(ctx, list); return err },
		"list classes":           func() error { _, err := client.StorageV1().StorageClasses().List(ctx, list); return err },
		"write events": func() error {
			_, err := core.Events(system).Create(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e2e"}}, metav1.CreateOptions{DryRun: []string{"All"}})
			return err
		},
		"become the controller": func() error {
			_, err := core.ServiceAccounts(system).CreateToken(ctx, controllers, &authentication.TokenRequest{}, metav1.CreateOptions{})
			return err
		},
		"approve a request": func() error {
			r := victim.DeepCopy()
			r.Status.Conditions = []certificates.CertificateSigningRequestCondition{{Type: certificates.CertificateApproved, Status: corev1.ConditionTrue, Reason: "E2E"}}
			_, err := client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, r.Name, r, metav1.UpdateOptions{})
			return err
		},
		"sign a request": func() error {
			r := victim.DeepCopy()
			r.Status.Certificate = []byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n")
			_, err := client.CertificatesV1().CertificateSigningRequests().UpdateStatus(ctx, r, metav1.UpdateOptions{})
			return err
		},
		"delete a request": func() error {
			return client.CertificatesV1().CertificateSigningRequests().Delete(ctx, victim.Name, metav1.DeleteOptions{})
		},
		"grant itself more": func() error {
			return client.RbacV1().ClusterRoles().Delete(ctx, nodeSet, metav1.DeleteOptions{DryRun: []string{"All"}})
		},
	}
	for what, attempt := range attempts {
		if err := attempt(); !apierrors.IsForbidden(err) {
			t.Errorf("a node tries to %s: %v; want it to be forbidden", what, err)
		}
	}
}

// newRequest is a CertificateSigningRequest with a key of its own, of which
// nobody has asked anything yet.
func newRequest(t testing.TB, name, signer, uri string) *certificates.CertificateSigningRequest {
	t.Helper()
	r, _ := request(t, name, signer, uri)
	return r
}

func request(t testing.TB, name, signer, uri string) (*certificates.CertificateSigningRequest, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	u, err := url.Parse(uri)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key)
	must(t, err)
	return &certificates.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: certificates.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: signer,
			Usages:     []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageServerAuth, certificates.UsageClientAuth},
		},
	}, key
}

// ask makes a request as a client and waits for the answer: a certificate, or
// nothing if it was denied.
func (s *space) ask(client *kubernetes.Clientset, uri string) (tls.Certificate, *x509.Certificate) {
	s.Helper()
	r, key := request(s.T, s.name+"-"+stamp(), peerSigner, uri)
	_, err := client.CertificatesV1().CertificateSigningRequests().Create(context.Background(), r, metav1.CreateOptions{})
	must(s.T, err)
	all := resource(s.T, "certificatesigningrequests.certificates.k8s.io", "")
	s.end = append(s.end, func() { remove(s.T, all, r.Name) })
	done := await(s.T, all, r.Name, "answered", func(r *certificates.CertificateSigningRequest) (bool, error) {
		if r == nil {
			return false, errGone
		}
		return len(r.Status.Certificate) > 0 || denied(r), nil
	})
	if denied(done) {
		if len(done.Status.Certificate) > 0 {
			s.Errorf("a request for %s was denied, and answered with a certificate", uri)
		}
		return tls.Certificate{}, nil
	}
	out := tls.Certificate{PrivateKey: key}
	for rest := done.Status.Certificate; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		out.Certificate = append(out.Certificate, block.Bytes)
	}
	leaf, err := x509.ParseCertificate(out.Certificate[0])
	must(s.T, err)
	return out, leaf
}

func denied(r *certificates.CertificateSigningRequest) bool {
	return slices.ContainsFunc(r.Status.Conditions, func(c certificates.CertificateSigningRequestCondition) bool {
		return c.Type == certificates.CertificateDenied || c.Type == certificates.CertificateFailed
	})
}

// A certificate for a node's name is given to the driver's pod on that node, and
// to nobody else, whatever else they may do.
func TestCertificatesOfNodes(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	own := "orlop://node/" + nodes[0]
	_, leaf := s.ask(nodeAccount(t, nodes[0]), own)
	if leaf == nil {
		t.Fatal("a node does not get a certificate for its own name")
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != own || leaf.IsCA || len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 {
		t.Errorf("the certificate is for %v %v %v, an authority: %t; want %s alone", leaf.URIs, leaf.DNSNames, leaf.IPAddresses, leaf.IsCA, own)
	}
	if left := time.Until(leaf.NotAfter); left > 366*24*time.Hour {
		t.Errorf("the certificate is valid for %s", left)
	}

	s.apply(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: ${name}}
rules: [{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [create, get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: ${name}}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ${name}}
subjects: [{kind: ServiceAccount, namespace: ${name}, name: default}]
`, "name", s.name)
	stranger := account(t, s.name, "default", nil)
	for what, c := range map[string]struct {
		client *kubernetes.Clientset
		uri    string
	}{
		"another node":                          {nodeAccount(t, nodes[0]), "orlop://node/" + nodes[1]},
		"the controller":                        {nodeAccount(t, nodes[0]), "orlop://controller"},
		"nobody":                                {nodeAccount(t, nodes[0]), "orlop://node/"},
		"a node, by another account":            {stranger, own},
		"a node, by an administrator":           {kube, own},
		"a node, by an account bound to no pod": {account(t, system, nodeSet, nil), own},
	} {
		if _, leaf := s.ask(c.client, c.uri); leaf != nil {
			t.Errorf("a certificate was given for the name of %s: %v", what, leaf.URIs)
		}
	}
}

// dial connects to a port of a pod, by way of the API server.
func dial(t testing.TB, pod string, port int) net.Conn {
	t.Helper()
	transport, upgrader, err := spdy.RoundTripperFor(admin)
	must(t, err)
	target := kube.CoreV1().RESTClient().Post().Namespace(system).Resource("pods").Name(pod).SubResource("portforward").URL()
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, target)
	stop, ready := make(chan struct{}), make(chan struct{})
	forward, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, io.Discard)
	must(t, err)
	failed := make(chan error, 1)
	go func() { failed <- forward.ForwardPorts() }()
	t.Cleanup(func() { close(stop) })
	select {
	case <-ready:
	case err := <-failed:
		t.Fatalf("connecting to %s: %v", pod, err)
	}
	ports, err := forward.GetPorts()
	must(t, err)
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	return conn
}

// A node's driver takes calls from the controller alone. It turns away who has no
// certificate, or one of another authority, and also another node: a stolen key
// of one node opens no other.
func TestPeersAreRefused(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	pod := nodePod(t, nodes[1])
	stolen, leaf := s.ask(nodeAccount(t, nodes[0]), "orlop://node/"+nodes[0])
	if leaf == nil {
		t.Fatal("a node does not get a certificate for its own name")
	}
	for what, keys := range map[string]*tls.Certificate{
		"nobody":                            nil,
		"a controller of another authority": forged(t, "orlop://controller"),
		"another node":                      &stolen,
	} {
		config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
		if keys != nil {
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return keys, nil }
		}
		conn := tls.Client(dial(t, pod, peerPort), config)
		err := conn.Handshake()
		if err == nil { // in TLS 1.3, the client hears of the refusal afterwards
			if uris := conn.ConnectionState().PeerCertificates[0].URIs; len(uris) != 1 || uris[0].String() != "orlop://node/"+nodes[1] {
				t.Errorf("the node shows itself as %v", uris)
			}
			if keys == &stolen {
				// A node may connect, to read what it has a ticket for. What
				// the router calls, it may not.
				if status := listVolumes(t, conn); status != permissionDenied {
					t.Errorf("ListVolumes by another node has gRPC status %q, want %s", status, permissionDenied)
				}
				continue
			}
			_, err = conn.Read(make([]byte, 1))
		}
		var alert tls.AlertError
		if refused := errors.As(err, &alert) || err != nil && strings.Contains(err.Error(), "remote error: tls"); !refused {
			t.Errorf("the node's answer to %s is %v; want a refusal", what, err)
		}
	}
}

// forged makes a certificate of an authority that nobody knows.
func forged(t testing.TB, uri string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	u, err := url.Parse(uri)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "orlop"},
		URIs:         []*url.URL{u},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// permissionDenied is the gRPC status code PERMISSION_DENIED.
const permissionDenied = "7"

// listVolumes makes a CSI call over a connection and gives its gRPC status code.
func listVolumes(t testing.TB, conn net.Conn) string {
	t.Helper()
	h2, err := (&http2.Transport{}).NewClientConn(conn)
	must(t, err)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://node/csi.v1.Controller/ListVolumes", bytes.NewReader(make([]byte, 5))) // an empty message
	must(t, err)
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	response, err := h2.RoundTrip(request)
	must(t, err)
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	must(t, err)
	if status := response.Trailer.Get("Grpc-Status"); status != "" {
		return status
	}
	return response.Header.Get("Grpc-Status")
}
