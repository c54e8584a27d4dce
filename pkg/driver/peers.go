package driver

import (
	"fmt"
	"net"
	"path/filepath"

	"google.golang.org/grpc/credentials"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/cluster"
	"github.com/orlop-csi/orlop/pkg/kubelet"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// csiVersion is the version of CSI that the driver tells the kubelet.
const csiVersion = "1.13.0"

// report writes what happens in the background to the log.
func report(message string, err error, about ...any) {
	if err != nil {
		klog.ErrorSDepth(1, err, message, about...)
		return
	}
	klog.InfoSDepth(1, message, about...)
}

// nodeCredentials are those with which this node serves the router and other
// nodes.
func (s *standalone) nodeCredentials() (credentials.TransportCredentials, error) {
	if !s.options.Kubernetes {
		own, err := peer.Load(s.options.TLSDir)
		if err != nil {
			return nil, fmt.Errorf("--tls-dir: %w", err)
		}
		s.own = own
		s.registry.MustRegister(certificateExpiry(own))
		return credentials.NewTLS(serverTLS(own)), nil
	}
	client, err := cluster.Connect(s.options.Kubeconfig, userAgent(s.options.Version))
	if err != nil {
		return nil, fmt.Errorf("--kubernetes: %w", err)
	}
	segment, err := pool.NodeSegment(s.options.NodeID)
	if err != nil {
		return nil, err
	}
	s.certificate = client.Certificate(segment, filepath.Join(s.options.StateDir, "tls"), report)
	s.health.awaited = append(s.health.awaited, func() error {
		_, err := s.certificate.Keys()
		return err
	})
	own := peer.New(s.certificate.Keys)
	s.own = own
	s.registry.MustRegister(certificateExpiry(own))
	return watchedHandshake{credentials.NewTLS(serverTLS(own)), s.certificate.Renew}, nil
}

// userAgent is what the driver calls itself to the API server.
func userAgent(version string) string { return "csi-driver/" + version }

// watchedHandshake tells when a handshake failed for that the authority of one
// side is unknown to the other.
type watchedHandshake struct {
	credentials.TransportCredentials

	strangers func()
}

func (w watchedHandshake) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := w.TransportCredentials.ServerHandshake(c)
	if peer.Strangers(err) {
		w.strangers()
	}
	return secured, info, err
}

func (w watchedHandshake) Clone() credentials.TransportCredentials {
	return watchedHandshake{w.TransportCredentials.Clone(), w.strangers}
}

// registerWithKubelet prepares the offer to the kubelet.
func (s *standalone) registerWithKubelet() error {
	endpoint, err := socketPath(s.options.Endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	s.registration = &kubelet.Registration{
		Directory: s.options.KubeletRegistration,
		Driver:    Name,
		Endpoint:  endpoint,
		Versions:  []string{csiVersion},
		Told:      func(err error) { report("The kubelet answered", err, "registered", err == nil) },
	}
	s.health.broken = append(s.health.broken, s.registration.Refusal)
	s.health.awaited = append(s.health.awaited, s.registration.Pending)
	s.registry.MustRegister(registered(s.registration))
	return nil
}
