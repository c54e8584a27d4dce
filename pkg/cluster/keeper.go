package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/orlop-csi/orlop/pkg/peer"
)

// Keeper keeps the authority for the certificates of router and nodes in a
// Secret, which all routers share. The first one makes it. When its time comes,
// there is a successor; see authority.next. A Secret that is deleted is written
// again as it was, as long as a router runs that knew it: otherwise no node
// would trust the routers until it has a new certificate.
type Keeper struct {
	client          *Client
	namespace, name string
	report          Report

	mu        sync.Mutex
	authority *authority      // as it is in the Secret; nil until that was read
	own       tls.Certificate // the router's own, of that authority
	problem   error           // why there is no authority

	known chan struct{} // closed when there is an authority
}

// Keeper prepares the keeping of an authority in that Secret.
func (c *Client) Keeper(namespace, name string, report Report) *Keeper {
	return &Keeper{client: c, namespace: namespace, name: name, report: report, problem: errNotYet, known: make(chan struct{})}
}

// lookAgain is how often the authority is looked at whether its time has come,
// and how soon what failed is tried again.
const (
	lookAgain = time.Hour
	tryAgain  = 2 * time.Second
)

// Run keeps the authority until ctx is done.
func (k *Keeper) Run(ctx context.Context) error {
	secrets, err := informer(k.client.core, "secrets", k.namespace, &core.Secret{}, nil, named(k.name))
	if err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	if err := onChange(secrets, func(*core.Secret) {
		select {
		case changed <- struct{}{}:
		default:
		}
	}); err != nil {
		return err
	}
	return run(ctx, func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-secrets.HasSyncedChecker().Done():
		}
		for {
			wait := lookAgain
			if err := k.reconcile(ctx, secrets.GetStore().List()); err != nil && ctx.Err() == nil {
				wait = tryAgain
				k.fail(fmt.Errorf("secret %s: %w", k.name, err))
			}
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-time.After(wait):
			}
		}
	}, secrets)
}

// reconcile brings the Secret to what it should be, and takes over what it is.
func (k *Keeper) reconcile(ctx context.Context, secrets []any) error {
	now := time.Now()
	if len(secrets) == 0 {
		return k.create(ctx, now)
	}
	secret, ok := secrets[0].(*core.Secret)
	if !ok {
		return fmt.Errorf("the API server sent a %T", secrets[0])
	}
	a, err := parseAuthority(secret.Data)
	if err != nil {
		return fmt.Errorf("%w; delete it, and a new one is made", err)
	}
	next, changed, err := a.next(now)
	if err != nil {
		return err
	}
	if !changed {
		k.adopt(a)
		return nil
	}
	updated := secret.DeepCopy()
	if updated.Data, err = next.data(); err != nil {
		return err
	}
	err = k.client.core.Put().Namespace(k.namespace).Resource("secrets").Name(k.name).Body(updated).Do(ctx).Error()
	if apierrors.IsConflict(err) {
		return nil // another router was first; its change comes by itself
	}
	if err != nil {
		return err
	}
	k.report("The authority was renewed", nil, "secret", k.name, "signer", next.signer.certificate.Subject.SerialNumber, "trusted", len(next.trusted()))
	k.adopt(next)
	return nil
}

// create writes the Secret where there is none.
func (k *Keeper) create(ctx context.Context, now time.Time) error {
	k.mu.Lock()
	a := k.authority
	k.mu.Unlock()
	if a == nil {
		var err error
		if a, err = newAuthority(now); err != nil {
			return err
		}
	}
	data, err := a.data()
	if err != nil {
		return err
	}
	secret := &core.Secret{
		ObjectMeta: meta.ObjectMeta{Name: k.name, Namespace: k.namespace, Labels: maps.Clone(ourLabels)},
		Type:       core.SecretTypeTLS,
		Data:       data,
	}
	err = k.client.core.Post().Namespace(k.namespace).Resource("secrets").Body(secret).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		return nil // another router was first; its Secret comes by itself
	}
	if err != nil {
		return err
	}
	k.report("The authority was written", nil, "secret", k.name, "signer", a.signer.certificate.Subject.SerialNumber)
	k.adopt(a)
	return nil
}

// ourLabels are those of the objects that the driver makes.
var ourLabels = map[string]string{"app.kubernetes.io/name": "orlop", "app.kubernetes.io/managed-by": "csi-driver"}

func (k *Keeper) adopt(a *authority) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.authority == nil {
		close(k.known)
	}
	if k.authority == nil || !slices.EqualFunc(k.authority.trusted(), a.trusted(), (*x509.Certificate).Equal) {
		k.authority, k.own = a, tls.Certificate{}
	}
	k.problem = nil
}

func (k *Keeper) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.problem == nil || k.problem.Error() != err.Error() { // once, not at every try
		k.report("The authority cannot be kept", err)
	}
	k.problem = err
}

// Problem is what is wrong with the authority; nil if nothing.
func (k *Keeper) Problem() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.problem
}

// current gives the authority.
func (k *Keeper) current() (*authority, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.authority == nil {
		return nil, fmt.Errorf("there is no authority: %w", k.problem)
	}
	return k.authority, nil
}

// Keys is what the router shows and trusts, for [peer.New]. Its certificate is
// made here and kept in memory only.
func (k *Keeper) Keys() (peer.Keys, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.authority == nil {
		return peer.Keys{}, fmt.Errorf("there is no authority: %w", k.problem)
	}
	now := time.Now()
	if k.own.Leaf == nil || now.After(k.own.Leaf.NotAfter.Add(-certificateLife/2)) {
		own, err := k.authority.keys(peer.Controller(), now)
		if err != nil {
			return peer.Keys{}, errors.Join(errors.New("making the router's certificate"), err)
		}
		k.own = own
	}
	return peer.Keys{Certificate: k.own, Trust: k.authority.pool()}, nil
}
