package cluster

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// SignerName is the signer of the certificates with which nodes serve the
// router.
const SignerName = "orlop.dev/peer"

// nodeNameClaim is what the API server says of a requester whose token is bound
// to a pod: the node that the pod is on (Kubernetes 1.30 and later).
const nodeNameClaim = "authentication.kubernetes.io/node-name"

// usages is what a certificate may, and must, be requested for.
var usages = []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageClientAuth, certificates.UsageServerAuth}

// refusal is why a request is not signed, in the terms of its conditions.
type refusal struct{ reason, message string }

func refuse(reason, format string, args ...any) *refusal {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// judge decides on a request: a node gets a certificate for itself, and nobody
// gets anything else. account is the user name of the nodes' service account.
// That a pod with that account runs on a node is the API server's word, in the
// claims of the token; what the request itself says counts for nothing without.
func judge(r *certificates.CertificateSigningRequestSpec, account string) (*x509.CertificateRequest, *url.URL, *refusal) {
	if r.Username != account {
		return nil, nil, refuse("WrongRequester", "only %s can ask for this certificate, not %s", account, r.Username)
	}
	claim := r.Extra[nodeNameClaim]
	if len(claim) != 1 || claim[0] == "" {
		return nil, nil, refuse("NoNodeClaim", "the requester's token is not bound to a pod on a node (it has no claim %s)", nodeNameClaim)
	}
	segment, err := pool.NodeSegment(claim[0])
	if err != nil {
		return nil, nil, refuse("BadNodeName", "%v", err)
	}
	identity := peer.Node(segment)
	if len(r.Usages) != len(usages) {
		return nil, nil, refuse("WrongUsages", "the usages must be %v", usages)
	}
	for _, u := range usages {
		if !slices.Contains(r.Usages, u) {
			return nil, nil, refuse("WrongUsages", "the usages must be %v", usages)
		}
	}
	block, rest := pem.Decode(r.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, refuse("BadRequest", "the request is not one PEM block of type CERTIFICATE REQUEST")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, nil, refuse("BadRequest", "%v", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, nil, refuse("BadRequest", "the requester does not have the key: %v", err)
	}
	if public, ok := request.PublicKey.(*ecdsa.PublicKey); !ok || public.Curve != elliptic.P256() {
		return nil, nil, refuse("WrongKey", "the key must be an ECDSA key on the curve P-256")
	}
	if len(request.URIs) != 1 || request.URIs[0].String() != identity.String() {
		return nil, nil, refuse("WrongName", "the requester is on node %s, and can have a certificate for %s only, not for %v", claim[0], identity, request.URIs)
	}
	if len(request.DNSNames)+len(request.IPAddresses)+len(request.EmailAddresses) > 0 || len(request.Subject.Names) > 0 {
		return nil, nil, refuse("WrongName", "the request must have no subject, and no alternative name but %s", identity)
	}
	for _, e := range request.Extensions {
		if !e.Id.Equal(alternativeNames) {
			return nil, nil, refuse("WrongExtension", "the request must have no extension but the subject alternative name, not %v", e.Id)
		}
	}
	return request, identity, nil
}

// alternativeNames is the extension of that name (RFC 5280, section 4.2.1.6).
var alternativeNames = asn1.ObjectIdentifier{2, 5, 29, 17}

// life is for how long a request is granted.
func life(r *certificates.CertificateSigningRequestSpec) time.Duration {
	if r.ExpirationSeconds == nil {
		return certificateLife
	}
	return min(time.Duration(*r.ExpirationSeconds)*time.Second, certificateLife)
}

// Sign decides on the certificate requests of the nodes and signs what it
// approves, until ctx is done. Any number of routers can do that at once.
// account is the name of the nodes' service account, in that namespace.
func (c *Client) Sign(ctx context.Context, k *Keeper, namespace, account string, report Report) error {
	requests, err := informer(c.certificates, "certificatesigningrequests", "", &certificates.CertificateSigningRequest{}, nil,
		func(o *meta.ListOptions) { o.FieldSelector = "spec.signerName=" + SignerName })
	if err != nil {
		return err
	}
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, 10*time.Second))
	defer queue.ShutDown()
	if err := onChange(requests, func(r *certificates.CertificateSigningRequest) { queue.Add(r.Name) }); err != nil {
		return err
	}
	s := &signer{c, k, "system:serviceaccount:" + namespace + ":" + account, requests.GetStore(), report}
	return run(ctx, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, queue.ShutDown)()
		select {
		case <-ctx.Done():
			return nil
		case <-k.known: // there is nothing to sign with before
		}
		for {
			name, shutdown := queue.Get()
			if shutdown {
				return nil
			}
			if err := s.consider(ctx, name); err != nil {
				if ctx.Err() == nil && queue.NumRequeues(name) == 0 {
					report("A certificate request waits", err, "request", name)
				}
				queue.AddRateLimited(name)
			} else {
				queue.Forget(name)
			}
			queue.Done(name)
		}
	}, requests)
}

type signer struct {
	client   *Client
	keeper   *Keeper
	account  string
	requests cache.Store
	report   Report
}

// consider deals with one request. It is nil if there is nothing to do.
func (s *signer) consider(ctx context.Context, name string) error {
	object, exists, err := s.requests.GetByKey(name)
	if err != nil || !exists {
		return err
	}
	r, ok := object.(*certificates.CertificateSigningRequest)
	if !ok || r.Spec.SignerName != SignerName || len(r.Status.Certificate) > 0 ||
		has(r, certificates.CertificateDenied) || has(r, certificates.CertificateFailed) {
		return nil
	}
	request, identity, refused := judge(&r.Spec, s.account)
	approved := has(r, certificates.CertificateApproved)
	switch {
	case refused != nil && approved: // by somebody else, who could not know better
		return s.end(ctx, r, certificates.CertificateFailed, "status", refused)
	case refused != nil:
		return s.end(ctx, r, certificates.CertificateDenied, "approval", refused)
	}
	authority, err := s.keeper.current()
	if err != nil {
		return err
	}
	if !approved {
		approval := withCondition(r, certificates.CertificateApproved, "NodeVerified", "the requester is a pod of the driver on the node that it names")
		if r, err = s.put(ctx, approval, "approval"); err != nil || r == nil {
			return err
		}
	}
	chain, err := authority.issue(request.PublicKey, identity, life(&r.Spec), time.Now())
	if err != nil {
		return err
	}
	issued := r.DeepCopy()
	issued.Status.Certificate = chain
	if r, err = s.put(ctx, issued, "status"); err != nil || r == nil {
		return err
	}
	s.report("A certificate was issued", nil, "request", r.Name, "identity", identity.String(), "signer", authority.signer.certificate.Subject.SerialNumber)
	return nil
}

// end writes down that a request is not signed, and why.
func (s *signer) end(ctx context.Context, r *certificates.CertificateSigningRequest, kind certificates.RequestConditionType, subresource string, why *refusal) error {
	ended, err := s.put(ctx, withCondition(r, kind, why.reason, why.message), subresource)
	if err != nil || ended == nil {
		return err
	}
	s.report("A certificate request was refused", errors.New(why.message), "request", r.Name, "requester", r.Spec.Username, "reason", why.reason)
	return nil
}

// put writes a subresource of a request. It gives nil if another was first: what
// that one did comes by itself.
func (s *signer) put(ctx context.Context, r *certificates.CertificateSigningRequest, subresource string) (*certificates.CertificateSigningRequest, error) {
	written := &certificates.CertificateSigningRequest{}
	err := s.client.certificates.Put().Resource("certificatesigningrequests").Name(r.Name).SubResource(subresource).Body(r).Do(ctx).Into(written)
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return nil, nil
	}
	return written, err
}

func has(r *certificates.CertificateSigningRequest, kind certificates.RequestConditionType) bool {
	return slices.ContainsFunc(r.Status.Conditions, func(c certificates.CertificateSigningRequestCondition) bool { return c.Type == kind })
}

func withCondition(r *certificates.CertificateSigningRequest, kind certificates.RequestConditionType, reason, message string) *certificates.CertificateSigningRequest {
	r = r.DeepCopy()
	r.Status.Conditions = append(r.Status.Conditions, certificates.CertificateSigningRequestCondition{
		Type: kind, Status: core.ConditionTrue, Reason: reason, Message: strings.ToValidUTF8(message, "?"),
	})
	return r
}
