package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/orlop-csi/orlop/pkg/driver"
)

// The test binary is the driver itself when this is set.
const beTheDriver = "ORLOP_TEST_BE_THE_DRIVER"

func TestMain(m *testing.M) {
	if os.Getenv(beTheDriver) != "" {
		main()
	}
	os.Exit(m.Run())
}

// command runs a command line in this process.
func command(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = execute(context.Background(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestBadUseIsOneLineAndExitCode2(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"nothing":             {nil, "a command must be given, such as standalone (see csi-driver --help)"},
		"unknown command":     {[]string{"standalon"}, `unknown command "standalon" for "csi-driver" (see csi-driver --help)`},
		"unknown flag":        {[]string{"standalone", "--conf", "x"}, "unknown flag: --conf (see csi-driver standalone --help)"},
		"unwanted argument":   {[]string{"standalone", "x"}, `unknown command "x" for "csi-driver standalone" (see csi-driver standalone --help)`},
		"no configuration":    {[]string{"standalone"}, "--config: must name the configuration file (see csi-driver standalone --help)"},
		"bad endpoint":        {[]string{"standalone", "--config", "x", "--endpoint", "tcp://:1"}, `--endpoint: "tcp://:1" is not of the form unix:///absolute/path/to/csi.sock (see csi-driver standalone --help)`},
		"bad node ID":         {[]string{"standalone", "--config", "x", "--node-id", "a/b"}, `--node-id: node name "a/b": only letters, digits, '-', '_' and '.' are allowed, with a letter or digit at both ends (see csi-driver standalone --help)`},
		"long node ID":        {[]string{"standalone", "--config", "x", "--node-id", strings.Repeat("a", 257)}, `--node-id: 257 bytes are more than the 256 that CSI allows (see csi-driver standalone --help)`},
		"relative state":      {[]string{"standalone", "--config", "x", "--state-dir", "state"}, `--state-dir: "state" is not an absolute path (see csi-driver standalone --help)`},
		"bad metrics address": {[]string{"standalone", "--config", "x", "--metrics-address", "9809"}, `--metrics-address: address 9809: missing port in address; give host:port, or nothing to turn it off (see csi-driver standalone --help)`},
		"negative timeout":    {[]string{"standalone", "--config", "x", "--shutdown-timeout", "-1s"}, `--shutdown-timeout: -1s is negative (see csi-driver standalone --help)`},
		"bad log format":      {[]string{"standalone", "--config", "x", "--log-format", "xml"}, `--log-format: "xml" is neither text nor json (see csi-driver standalone --help)`},
		"bad verbosity":       {[]string{"standalone", "-v", "-1"}, `invalid argument "-1" for "-v, --v" flag: strconv.ParseUint: parsing "-1": invalid syntax (see csi-driver standalone --help)`},
		"node without trust":  {[]string{"node", "--config", "x"}, "--tls-dir: must name the directory of the credentials; or give --kubernetes, and they come by themselves (see csi-driver node --help)"},
		"node with both":      {[]string{"node", "--config", "x", "--tls-dir", "x", "--kubernetes"}, "--tls-dir and --kubernetes: give one of them (see csi-driver node --help)"},
		"kubeconfig alone":    {[]string{"node", "--config", "x", "--tls-dir", "x", "--kubeconfig", "x"}, "--kubeconfig: is of use only with --kubernetes (see csi-driver node --help)"},
		"no peer address":     {[]string{"node", "--config", "x", "--peer-address", ""}, "--peer-address must be given; without a router, use csi-driver standalone (see csi-driver node --help)"},
		"relative registry":   {[]string{"node", "--config", "x", "--kubernetes", "--kubelet-registration-dir", "x"}, `--kubelet-registration-dir: "x" is not an absolute path (see csi-driver node --help)`},
		"router alone":        {[]string{"controller"}, "--tls-dir: must name the directory of the credentials; or give --kubernetes, and they come by themselves (see csi-driver controller --help)"},
		"router without node": {[]string{"controller", "--tls-dir", "x"}, "--node: must name at least one node, as name=host:port; or give --kubernetes, and they are found (see csi-driver controller --help)"},
		"router with both":    {[]string{"controller", "--kubernetes", "--node", "a=b:1"}, "--node and --kubernetes: give one of them (see csi-driver controller --help)"},
		"no secret":           {[]string{"controller", "--kubernetes", "--ca-secret", ""}, "--ca-secret: must have a name (see csi-driver controller --help)"},
		"bad output":          {[]string{"version", "--output", "xml"}, `--output: "xml" is neither text nor json (see csi-driver version --help)`},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := command(test.args...)
			if code != exitUsage || out != "" || errOut != "csi-driver: "+test.want+"\n" {
				t.Errorf("exit code %d, output %q, error\n%swant\ncsi-driver: %s", code, out, errOut, test.want)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	code, text, _ := command("version")
	if code != 0 || !regexp.MustCompile(`^csi-driver \S+ go1\.\S+ linux/\w+( [0-9a-f]+\+?)?\n$`).MatchString(text) {
		t.Errorf("exit code %d, output %q", code, text)
	}
	code, text, _ = command("version", "-o", "json")
	var b build
	if err := json.Unmarshal([]byte(text), &b); err != nil || code != 0 || b != buildOf() || b.Version == "" {
		t.Errorf("exit code %d, output %q (error %v)", code, text, err)
	}
	defer func(before string) { version = before }(version)
	version = "v1.2.3"
	if got := buildOf().Version; got != "v1.2.3" {
		t.Errorf("the version of a release is %q", got)
	}
}

func TestHelpTeachesEveryFlag(t *testing.T) {
	root := newRoot()
	for _, c := range root.Commands() {
		code, out, errOut := command(c.Name(), "--help")
		if code != 0 || errOut != "" {
			t.Errorf("%s: exit code %d, error %q", c.Name(), code, errOut)
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if !strings.Contains(out, "--"+f.Name+" ") {
				t.Errorf("%s --help lacks --%s", c.Name(), f.Name)
			}
			if value, usage := pflag.UnquoteUsage(f); value == "" && f.Value.Type() != "bool" || len(usage) < 30 {
				t.Errorf("--%s of %s tells too little: %q", f.Name, c.Name(), usage)
			}
		})
	}
}

func TestTheReferenceHasEveryFlagAndMetric(t *testing.T) {
	code, out, _ := command("reference")
	if code != 0 {
		t.Fatalf("exit code %d", code)
	}
	var want []string
	for _, c := range newRoot().Commands() {
		if !c.Hidden {
			want = append(want, "## csi-driver "+c.Name()+"\n")
			c.Flags().VisitAll(func(f *pflag.Flag) { want = append(want, "`--"+f.Name) })
		}
	}
	for _, m := range driver.Metrics() {
		want = append(want, "| `"+m.Name+"` | "+m.Type+" |")
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("lacks %q", w)
		}
	}
	if host, _ := os.Hostname(); strings.Contains(out, "`"+host+"`") {
		t.Error("it depends on the machine")
	}
}

func TestShellsCanComplete(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, _ := command("completion", shell); code != 0 || !strings.Contains(out, "csi-driver") {
			t.Errorf("%s: exit code %d, %d bytes", shell, code, len(out))
		}
	}
	_, out, _ := command(cobra.ShellCompRequestCmd, "standalone", "--log-format", "")
	if !strings.HasPrefix(out, "text\njson\n") {
		t.Errorf("--log-format completes to %q", out)
	}
}

// site is a directory with what a driver needs: a pool's directory and a
// configuration that names it.
type site struct{ dir string }

func newSite(t *testing.T) site {
	t.Helper()
	dir, err := os.MkdirTemp("", "orlop-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := site{dir}
	if err := os.Mkdir(s.at("pool"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.configure(t, fmt.Sprintf("pools:\n- name: default\n  source: {directory: %s}\n", s.at("pool")))
	return s
}

func (s site) at(name string) string { return filepath.Join(s.dir, name) }

func (s site) configure(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(s.at("config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// process is a driver that runs.
type process struct {
	*exec.Cmd
	mu    sync.Mutex
	lines []string // of its log
	ended chan struct{}
	// metrics is the address of its HTTP server.
	metrics string
}

func (s site) command(args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], append([]string{
		"standalone", "--config", s.at("config.yaml"), "--endpoint", "unix://" + s.at("csi.sock"),
		"--state-dir", s.at("state"), "--metrics-address", "127.0.0.1:0", "--node-id", "test-node",
	}, args...)...)
	c.Env = append(os.Environ(), beTheDriver+"=1")
	return c
}

// start runs a driver and waits until it serves.
func (s site) start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{Cmd: s.command(args...), ended: make(chan struct{})}
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	serving := make(chan struct{})
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`)
	go func() {
		defer close(p.ended)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			line := lines.Text()
			p.mu.Lock()
			p.lines = append(p.lines, line)
			if found := address.FindString(line); found != "" && p.metrics == "" {
				p.metrics = found
			}
			p.mu.Unlock()
			if strings.Contains(line, `"Serving"`) {
				close(serving)
			}
		}
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill() // it may have ended
		_ = p.Wait()
	})
	select {
	case <-serving:
	case <-p.ended:
		t.Fatalf("it ended: %s", p.log())
	case <-time.After(30 * time.Second):
		t.Fatalf("it does not serve: %s", p.log())
	}
	return p
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// end sends a signal and gives the exit code; -1 is death by the signal.
func (p *process) end(t *testing.T, s os.Signal) int {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.ended:
	case <-time.After(30 * time.Second):
		t.Fatalf("it does not end: %s", p.log())
	}
	var exit *exec.ExitError
	if err := p.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return p.ProcessState.ExitCode()
}

func (s site) client(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+s.at("csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (p *process) get(t *testing.T, path string) (int, string) {
	t.Helper()
	r, err := http.Get("http://" + p.metrics + path)
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

func TestAFailedStartIsOneLineAndExitCode1AndTouchesNothing(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(t *testing.T, s site)
		args    []string
		want    func(s site) string
	}{
		"no configuration file": {
			prepare: func(t *testing.T, s site) {
				t.Helper()
				if err := os.Remove(s.at("config.yaml")); err != nil {
					t.Fatal(err)
				}
			},
			want: func(s site) string {
				return "configuration: open " + s.at("config.yaml") + ": no such file or directory"
			},
		},
		"unknown field": {
			prepare: func(t *testing.T, s site) {
				t.Helper()
				s.configure(t, "pools: [{nam: a}]")
			},
			want: func(s site) string {
				return "configuration " + s.at("config.yaml") + ": pools[0].nam: unknown field; the known ones are name, source, reserve, overcommit"
			},
		},
		"a directory that is not there": {
			prepare: func(t *testing.T, s site) {
				t.Helper()
				s.configure(t, "pools: [{name: a, source: {directory: "+s.at("none")+"}}]")
			},
			want: func(s site) string {
				return "configuration " + s.at("config.yaml") + ": pools[0]: source.directory: stat " + s.at("none") + ": no such file or directory; make it, or mount its disk, first"
			},
		},
		"an endpoint without directory": {
			args: []string{"--endpoint", "unix:///nonexistent/csi.sock"},
			want: func(site) string {
				return "--endpoint: the directory /nonexistent does not exist; make it first"
			},
		},
		"a state directory without parent": {
			args: []string{"--state-dir", "/nonexistent/state"},
			want: func(site) string {
				return "--state-dir: mkdir /nonexistent/state: no such file or directory"
			},
		},
		"an address that is not ours": {
			args: []string{"--metrics-address", "192.0.2.1:9"}, // TEST-NET-1, RFC 5737
			want: func(site) string {
				return "--metrics-address: listen tcp 192.0.2.1:9: bind: cannot assign requested address"
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			if test.prepare != nil {
				test.prepare(t, s)
			}
			before := tree(t, s.dir)
			c := s.command(test.args...)
			var errOut bytes.Buffer
			c.Stderr = &errOut
			if err := c.Run(); c.ProcessState == nil || c.ProcessState.ExitCode() != exitFailure {
				t.Errorf("it ends with %v", err)
			}
			if got, want := errOut.String(), "csi-driver: "+test.want(s)+"\n"; got != want {
				t.Errorf("got  %swant %s", got, want)
			}
			if after := tree(t, s.dir); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// tree lists what is in a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	if err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		all = append(all, path)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

func TestTheDriverServesUntilASignal(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(sig.String(), func(t *testing.T) {
			s := newSite(t)
			p := s.start(t)
			conn := s.client(t)
			probe, err := csi.NewIdentityClient(conn).Probe(t.Context(), &csi.ProbeRequest{}, grpc.WaitForReady(true))
			if err != nil || !probe.GetReady().GetValue() {
				t.Errorf("Probe: %v (error %v)", probe, err)
			}
			if _, err := csi.NewControllerClient(conn).ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{}); err != nil {
				t.Errorf("Controller: %v", err)
			}
			info, err := csi.NewNodeClient(conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
			if err != nil || info.GetNodeId() != "test-node" {
				t.Errorf("Node: %v (error %v)", info, err)
			}
			if code, body := p.get(t, "/healthz"); code != http.StatusOK || body != "ok\n" {
				t.Errorf("healthz: %d %q", code, body)
			}
			_, metrics := p.get(t, "/metrics")
			for _, want := range []string{
				`orlop_pool_healthy{pool="default"} 1`,
				`orlop_pool_capacity_bytes{pool="default"} `,
				`csi_plugin_operations_seconds_count{driver_name="csi.orlop.dev",grpc_status_code="OK",method_name="/csi.v1.Identity/Probe"} 1`,
			} {
				if !strings.Contains(metrics, "\n"+want) {
					t.Errorf("the metrics lack %s", want)
				}
			}
			if code := p.end(t, sig); code != 0 {
				t.Errorf("exit code %d: %s", code, p.log())
			}
			if left, _ := filepath.Glob(s.at("csi.sock*")); len(left) > 0 {
				t.Errorf("%v is left", left)
			}
		})
	}
}

func TestADriverThatWasKilledIsReplacedAndALiveOneIsNot(t *testing.T) {
	s := newSite(t)
	first := s.start(t)
	first.end(t, syscall.SIGKILL)
	if _, err := os.Lstat(s.at("csi.sock")); err != nil {
		t.Fatalf("a driver that is killed leaves its socket: %v", err)
	}
	second := s.start(t)

	out, err := s.command().CombinedOutput()
	if want := "csi-driver: --endpoint: another process holds " + s.at("csi.sock.lock") + "\n"; err == nil || string(out) != want {
		t.Errorf("on the same socket: %q (%v), want %q", out, err, want)
	}
	out, err = s.command("--endpoint", "unix://"+s.at("other.sock")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "csi-driver: configuration "+s.at("config.yaml")+": pools[0]: ") {
		t.Errorf("on the same pool: %q (%v)", out, err)
	}
	if _, err := csi.NewIdentityClient(s.client(t)).Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Errorf("the live driver: %v", err)
	}
	if code := second.end(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d: %s", code, second.log())
	}
}

func TestJSONLogsAreOneObjectInEachLine(t *testing.T) {
	s := newSite(t)
	p := s.start(t, "--log-format", "json", "-v", "5")
	identity := csi.NewIdentityClient(s.client(t))
	if _, err := identity.Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Fatal(err)
	}
	if code := p.end(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	var calls int
	for line := range strings.Lines(p.log()) {
		var entry struct {
			Time      time.Time `json:"time"`
			Level     string    `json:"level"`
			Msg       string    `json:"msg"`
			Method    string    `json:"method"`
			Code      string    `json:"code"`
			RequestID string    `json:"requestID"`
			Duration  string    `json:"duration"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if entry.Time.IsZero() || entry.Level == "" || entry.Msg == "" {
			t.Errorf("lacks the time, the level or the message: %s", line)
		}
		if entry.Msg == "Call" && entry.Method == csi.Identity_Probe_FullMethodName && entry.Code == "OK" && entry.RequestID != "" && entry.Duration != "" {
			calls++
		}
	}
	if calls != 1 {
		t.Errorf("%d lines tell of the call:\n%s", calls, p.log())
	}
}
