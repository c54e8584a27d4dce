package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// authority is the cluster's certificate authority. Its directory has NAME.crt
// and NAME.key for each certificate, and NAME.kubeconfig for each client.
type authority struct {
	dir         string
	server      string // URL of the API server
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

const validity = 30 * 24 * time.Hour

func newAuthority(dir, server string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a := &authority{dir: dir, server: server}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "orlop-e2e"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	var err error
	a.certificate, a.key, err = a.write("ca", template)
	return a, err
}

// write signs a certificate, the authority's own if there is none yet, and writes
// it and its key.
func (a *authority) write(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		return nil, nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(validity)
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, fmt.Errorf("sign %s: %w", name, err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(a.file(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return nil, nil, err
	}
	return certificate, key, a.writeKey(name+".key", key)
}

func (a *authority) writeKey(name string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(a.file(name), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// serviceAccounts writes the pair of keys of service account tokens:
// service-accounts.key and .pub.
func (a *authority) serviceAccounts() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := a.writeKey("service-accounts.key", key); err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return os.WriteFile(a.file("service-accounts.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
}

// serve writes the certificate of a server.
func (a *authority) serve(name string, addresses ...string) error {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"},
	}
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(address))
	}
	_, _, err := a.write(name, template)
	return err
}

// client writes the certificate and the kubeconfig of a client.
func (a *authority) client(name, user string, groups ...string) error {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: user, Organization: groups}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if _, _, err := a.write(name, template); err != nil {
		return err
	}
	config := api.NewConfig()
	config.Clusters["orlop-e2e"] = &api.Cluster{Server: a.server}
	config.AuthInfos[user] = &api.AuthInfo{}
	config.Contexts["orlop-e2e"] = &api.Context{Cluster: "orlop-e2e", AuthInfo: user}
	config.CurrentContext = "orlop-e2e"
	// All in one file: it can be copied.
	for file, field := range map[string]*[]byte{
		"ca.crt":      &config.Clusters["orlop-e2e"].CertificateAuthorityData,
		name + ".crt": &config.AuthInfos[user].ClientCertificateData,
		name + ".key": &config.AuthInfos[user].ClientKeyData,
	} {
		data, err := os.ReadFile(a.file(file))
		if err != nil {
			return err
		}
		*field = data
	}
	return clientcmd.WriteToFile(*config, a.kubeconfig(name))
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) kubeconfig(name string) string { return a.file(name + ".kubeconfig") }
