//go:build integration

package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/orlop-csi/orlop/pkg/driver"
	"github.com/orlop-csi/orlop/pkg/peer"
	"github.com/orlop-csi/orlop/tests/harness"
)

// kubernetesNode is a node as the DaemonSet runs it, in a cluster whose API
// server cannot be reached, with a kubelet that the test is.
type kubernetesNode struct {
	*harness.Driver
	registry, web, peer string
}

func startKubernetesNode(t *testing.T) kubernetesNode {
	t.Helper()
	d := harness.New(t, harness.FilePool("4Gi"))
	n := kubernetesNode{d, filepath.Join(d.Dir, "r"), freePort(t), freePort(t)}
	if err := os.Mkdir(n.registry, 0o700); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(d.Dir, "kubeconfig")
	if err := os.WriteFile(kubeconfig, fmt.Appendf(nil, `
apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: "https://%s"}}]
users: [{name: nobody, user: {token: none}}]
contexts: [{name: none, context: {cluster: none, user: nobody}}]
current-context: none
`, freePort(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Mode = "node"
	d.Args = []string{
		"--kubernetes", "--kubeconfig", kubeconfig, "--kubelet-registration-dir", n.registry,
		"--peer-address", n.peer, "--metrics-address", n.web,
	}
	d.Start()
	return n
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// watch does what the kubelet's plugin watcher does with a socket in its
// directory, and gives what the plugin says it is.
func (n kubernetesNode) watch(t *testing.T, answer *registration.RegistrationStatus) *registration.PluginInfo {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+filepath.Join(n.registry, driver.Name+"-reg.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := registration.NewRegistrationClient(conn)
	info, err := client.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.NotifyRegistrationStatus(ctx, answer); err != nil {
		t.Fatal(err)
	}
	return info
}

func (n kubernetesNode) get(t *testing.T, path string) (int, string) {
	t.Helper()
	r, err := http.Get("http://" + n.web + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func TestTheKubeletIsServedWhileTheAPIServerCannotBeReached(t *testing.T) {
	n := startKubernetesNode(t)
	info := n.watch(t, &registration.RegistrationStatus{PluginRegistered: true})
	if info.GetType() != registration.CSIPlugin || info.GetName() != driver.Name || info.GetEndpoint() != n.Socket {
		t.Fatalf("the kubelet is told %v", info)
	}
	// At the endpoint that it was told, it finds the node.
	conn, err := grpc.NewClient("unix://"+info.GetEndpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if node, err := csi.NewNodeClient(conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{}); err != nil || node.GetNodeId() != n.Node {
		t.Errorf("%v, %v", node, err)
	}
	v := n.Create("v", 1<<30, harness.Block(harness.Writer))
	n.Delete(v.GetVolumeId())

	if code, body := n.get(t, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d %s", code, body)
	}
	if code, body := n.get(t, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "certificate") {
		t.Errorf("readyz: %d %s", code, body)
	}
	_, metrics := n.get(t, "/metrics")
	for _, want := range []string{"orlop_kubelet_registered 1", "orlop_peer_certificate_expiration_timestamp_seconds 0"} {
		if !strings.Contains(metrics, "\n"+want+"\n") {
			t.Errorf("the metrics lack %s", want)
		}
	}
	// Without a certificate, nobody gets through to the port for the router.
	if conn, err := tls.Dial("tcp", n.peer, &tls.Config{InsecureSkipVerify: true}); err == nil {
		conn.Close()
		t.Error("the node serves its peers without a certificate")
	}
}

func TestADriverThatTheKubeletRefusesIsNotHealthy(t *testing.T) {
	n := startKubernetesNode(t)
	n.watch(t, &registration.RegistrationStatus{Error: "another driver has that name"})
	if code, body := n.get(t, "/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "another driver has that name") {
		t.Errorf("healthz: %d %s", code, body)
	}
	n.watch(t, &registration.RegistrationStatus{PluginRegistered: true})
	if code, body := n.get(t, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz after the kubelet accepted it: %d %s", code, body)
	}
}

func TestTheDriverRegistersAgain(t *testing.T) {
	n := startKubernetesNode(t)
	socket := filepath.Join(n.registry, driver.Name+"-reg.sock")
	n.watch(t, &registration.RegistrationStatus{PluginRegistered: true})
	// Each of these is followed by the kubelet's finding a socket.
	for name, do := range map[string]func() error{
		"the kubelet restarted":  func() error { return nil },
		"the socket was removed": func() error { return os.Remove(socket) },
		"the driver restarted":   func() error { n.Restart(); return nil },
		"the driver was killed":  func() error { n.Kill(); n.Start(); return nil },
	} {
		if err := do(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if c, err := net.Dial("unix", socket); err == nil {
				c.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: there is no socket", name)
			}
		}
		if info := n.watch(t, &registration.RegistrationStatus{PluginRegistered: true}); info.GetEndpoint() != n.Socket {
			t.Errorf("%s: the kubelet is told %v", name, info)
		}
		if _, metrics := n.get(t, "/metrics"); !strings.Contains(metrics, "\norlop_kubelet_registered 1\n") {
			t.Errorf("%s: it does not count as registered", name)
		}
	}
	n.Stop()
	if left, err := os.ReadDir(n.registry); err != nil || len(left) > 0 {
		t.Errorf("%v, %v is left after the end", left, err)
	}
}

// Who is not the router gets nothing from a node; see also pkg/peer.
func TestANodeServesTheRouterAndNobodyElse(t *testing.T) {
	f := harness.StartFleet(t, harness.FilePool("1Gi"))
	later := time.Now().Add(time.Hour)
	load := func(a *harness.Authority, identity *url.URL, until time.Time) credentials.TransportCredentials {
		dir := t.TempDir()
		a.Issue(dir, identity, until)
		c, err := peer.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		return credentials.NewTLS(c.Client(f.Nodes[0].Node))
	}
	for name, test := range map[string]struct {
		credentials credentials.TransportCredentials
		want        codes.Code
	}{
		"the router":               {load(f.Authority, peer.Controller(), later), codes.OK},
		"no TLS":                   {insecure.NewCredentials(), codes.Unavailable},
		"no certificate":           {credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}), codes.Unavailable},
		"another authority":        {load(harness.NewAuthority(t), peer.Controller(), later), codes.Unavailable},
		"a node":                   {load(f.Authority, peer.Node("node-2"), later), codes.PermissionDenied},
		"the node itself":          {load(f.Authority, peer.Node(f.Nodes[0].Node), later), codes.PermissionDenied},
		"a certificate that ended": {load(f.Authority, peer.Controller(), time.Now().Add(-time.Minute)), codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := grpc.NewClient(f.Address(0), grpc.WithTransportCredentials(test.credentials))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_, err = csi.NewControllerClient(conn).ListVolumes(ctx, &csi.ListVolumesRequest{})
			routerWant(t, err, test.want)
			if test.want == codes.OK { // and what is not the router's is not there at all
				_, err = csi.NewNodeClient(conn).NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
				routerWant(t, err, codes.Unimplemented)
			}
		})
	}
}

func TestTheRouterDoesNotTakeOneNodeForAnother(t *testing.T) {
	f := harness.StartFleet(t, harness.FilePool("1Gi"), harness.FilePool("1Gi"))
	f.Stop()
	f.Args = append(f.Args, "--node", "node-1="+f.Address(1), "--node", "node-2="+f.Address(0))
	f.Start()
	_, err := f.ListVolumes(f.Context(), &csi.ListVolumesRequest{})
	routerWant(t, err, codes.Unavailable, "orlop://node/node-1", "orlop://node/node-2")
}
