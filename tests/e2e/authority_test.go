package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// authoritySecret is where the controllers keep their certificate authority.
const authoritySecret = "orlop-ca"

// authority waits until the Secret is there, and gives it.
func authority(t testing.TB) *corev1.Secret {
	t.Helper()
	return await(t, resource(t, "secrets", system), authoritySecret, "written", func(s *corev1.Secret) (bool, error) {
		return s != nil && len(s.Data["tls.crt"]) > 0, nil
	})
}

// scale sets the number of controllers, and waits until there are as many.
func scale(t testing.TB, n int32) {
	t.Helper()
	deployments := resource(t, "deployments.apps", system)
	patch(t, deployments, controllers, fmt.Sprintf(`{spec: {replicas: %d}}`, n))
	await(t, deployments, controllers, fmt.Sprintf("scaled to %d", n), func(o *appsv1.Deployment) (bool, error) {
		if o == nil {
			return false, errGone
		}
		return o.Status.ObservedGeneration == o.Generation && o.Status.Replicas == n && o.Status.AvailableReplicas == n, nil
	})
	eventually(t, "as many pods", func() error {
		list, err := kube.CoreV1().Pods(system).List(context.Background(), metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/name=orlop,app.kubernetes.io/component=controller",
		})
		if err == nil && len(list.Items) != int(n) {
			err = fmt.Errorf("there are %d pods", len(list.Items))
		}
		return err
	})
}

// Somebody deletes the Secret of the authority: it is written again as it was,
// and goes on being used. When all who knew it are gone as well, there is a new
// authority, and every node comes to trust it, without having been restarted.
func TestAuthorityIsDeleted(t *testing.T) {
	s := newSpace(t)
	names := s.writers("orlop")
	before := authority(t)
	secrets := kube.CoreV1().Secrets(system)
	must(t, secrets.Delete(context.Background(), authoritySecret, metav1.DeleteOptions{}))
	if after := authority(t); !bytes.Equal(before.Data["tls.crt"], after.Data["tls.crt"]) || !bytes.Equal(before.Data["tls.key"], after.Data["tls.key"]) {
		t.Error("it is another one, though the controllers knew it")
	}
	s.useNode(nodes[0])

	deployment, err := kube.AppsV1().Deployments(system).Get(context.Background(), controllers, metav1.GetOptions{})
	must(t, err)
	scale(t, 0)
	t.Cleanup(func() { scale(t, *deployment.Spec.Replicas) })
	must(t, secrets.Delete(context.Background(), authoritySecret, metav1.DeleteOptions{}))
	scale(t, *deployment.Spec.Replicas)
	if after := authority(t); bytes.Equal(before.Data["tls.crt"], after.Data["tls.crt"]) {
		t.Error("nobody could know it, and it is the same")
	}
	for i, node := range nodes {
		s.useNode(node)
		s.goesOn(names[i], 5)
	}
}

// Something takes the driver's socket out of the kubelet's directory: the driver
// registers again.
func TestRegistrationIsTakenAway(t *testing.T) {
	s := newSpace(t)
	node := nodes[0]
	socket := machineOf(t, node).Path(filepath.Join("/var/lib/kubelet/plugins_registry", driverName+"-reg.sock"))
	before, err := os.Stat(socket)
	must(t, err)
	must(t, os.Remove(socket))
	eventually(t, "there is another socket", func() error {
		after, err := os.Stat(socket)
		if err == nil && os.SameFile(before, after) && before.ModTime().Equal(after.ModTime()) {
			err = fmt.Errorf("%s is still the old one", socket)
		}
		return err
	})
	eventually(t, "the kubelet has the driver again", func() error {
		page, err := metrics(nodePod(t, node), nodeMetrics)
		if err != nil {
			return err
		}
		if n, err := sample(page, "orlop_kubelet_registered"); err != nil || n != 1 {
			return fmt.Errorf("registered: %v (%w)", n, err)
		}
		return nil
	})
	served(t, node)
	s.useNode(node)
}

// anAuthority makes a certificate authority, as the controllers make theirs.
func anAuthority(t testing.TB, from, until time.Time) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(from.UnixNano()),
		Subject:               pkix.Name{CommonName: "Orlop peers", SerialNumber: rand.Text()[:10]},
		NotBefore:             from,
		NotAfter:              until,
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	must(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// The controllers find an authority near its end: they make a successor, which
// is trusted from then on and does not sign yet. One that was made days ago takes
// over. Nodes go on being served.
func TestAuthorityIsReplacedInTime(t *testing.T) {
	s := newSpace(t)
	const day = 24 * time.Hour
	now := time.Now()
	old, oldKey := anAuthority(t, now.Add(-300*day), now.Add(65*day))
	young, youngKey := anAuthority(t, now.Add(-3*day), now.Add(362*day))
	secrets := kube.CoreV1().Secrets(system)
	deployment, err := kube.AppsV1().Deployments(system).Get(context.Background(), controllers, metav1.GetOptions{})
	must(t, err)
	t.Cleanup(func() { scale(t, *deployment.Spec.Replicas) })

	for what, c := range map[string]struct {
		data           map[string][]byte
		signer, trusts []byte // what must be there afterwards
		successor      bool
	}{
		"the end is near": {
			data:      map[string][]byte{"tls.crt": old, "tls.key": oldKey, "ca.crt": old},
			signer:    old,
			trusts:    old,
			successor: true,
		},
		"the successor's time has come": {
			data:   map[string][]byte{"tls.crt": old, "tls.key": oldKey, "next.crt": young, "next.key": youngKey, "ca.crt": slices.Concat(old, young)},
			signer: young,
			trusts: old,
		},
	} {
		scale(t, 0)
		must(t, secrets.Delete(context.Background(), authoritySecret, metav1.DeleteOptions{}))
		_, err := secrets.Create(context.Background(), &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: authoritySecret}, Type: corev1.SecretTypeTLS, Data: c.data,
		}, metav1.CreateOptions{})
		must(t, err)
		scale(t, *deployment.Spec.Replicas)
		await(t, resource(t, "secrets", system), authoritySecret, "brought up to date when "+what, func(o *corev1.Secret) (bool, error) {
			if o == nil {
				return false, errGone
			}
			return bytes.Equal(o.Data["tls.crt"], c.signer) && bytes.Contains(o.Data["ca.crt"], c.trusts) &&
				(len(o.Data["next.crt"]) > 0) == c.successor && bytes.Count(o.Data["ca.crt"], []byte("BEGIN")) == 2, nil
		})
		for _, node := range nodes {
			s.useNode(node)
		}
	}
}
