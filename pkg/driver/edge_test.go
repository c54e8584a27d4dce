package driver

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// logged is a log that is being written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// captureLog takes the log of this process at a verbosity, until the test ends.
func captureLog(t *testing.T, format string, verbosity int) *logged {
	t.Helper()
	before := klog.CaptureState()
	t.Cleanup(before.Restore)
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	for name, value := range map[string]string{
		"logtostderr": "false", "alsologtostderr": "false", "stderrthreshold": "FATAL", "one_output": "true", "v": fmt.Sprint(verbosity),
	} {
		if err := flags.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	l := &logged{}
	klog.SetOutput(l)
	klog.ClearLogger()
	if format == "json" {
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.Level(-verbosity)})))
	}
	return l
}

// fakeServices answers calls as a test wants.
type fakeServices struct {
	csi.UnimplementedControllerServer
	csi.UnimplementedSnapshotMetadataServer
	create func(context.Context, *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error)
	delta  func(*csi.GetMetadataDeltaRequest, csi.SnapshotMetadata_GetMetadataDeltaServer) error
}

func (s *fakeServices) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return s.create(ctx, r)
}

func (s *fakeServices) GetCapacity(context.Context, *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	return &csi.GetCapacityResponse{}, nil
}

func (s *fakeServices) GetMetadataDelta(r *csi.GetMetadataDeltaRequest, out csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	return s.delta(r, out)
}

// served is a server of the fake services and a client of it.
type served struct {
	calls  *calls
	path   string // of its socket
	conn   *grpc.ClientConn
	client csi.ControllerClient
	stop   context.CancelFunc
	ended  chan error
}

func serve(t *testing.T, services *fakeServices, drain time.Duration) *served {
	t.Helper()
	l := mustListen(t, shortDir(t)+"/csi.sock")
	s := &served{path: l.path, calls: newCalls(l, newCallMetrics(), &readiness{}, drain), ended: make(chan error, 1)}
	csi.RegisterIdentityServer(s.calls.server, &identity{version: "v1.2.3", ready: s.calls.ready})
	csi.RegisterControllerServer(s.calls.server, services)
	csi.RegisterSnapshotMetadataServer(s.calls.server, services)
	ctx, stop := context.WithCancel(t.Context())
	s.stop = stop
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		s.ended <- s.calls.serve(ctx)
	}()
	var err error
	if s.conn, err = grpc.NewClient("unix://"+l.path, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.conn.Close()
		stop()
		<-gone // it logs, and what it logs to is put back after this
	})
	s.client = csi.NewControllerClient(s.conn)
	return s
}

func TestAPanicFailsOneCallAndNotTheProcess(t *testing.T) {
	log := captureLog(t, "text", 0)
	s := serve(t, &fakeServices{
		create: func(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
			if r.GetName() == "bad" {
				panic("the cellar is flooded")
			}
			return &csi.CreateVolumeResponse{}, nil
		},
		delta: func(*csi.GetMetadataDeltaRequest, csi.SnapshotMetadata_GetMetadataDeltaServer) error {
			panic("so is the attic")
		},
	}, time.Second)

	_, err := s.client.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "bad"})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "cellar") {
		t.Errorf("the caller gets %v", err)
	}
	stream, err := csi.NewSnapshotMetadataClient(s.conn).GetMetadataDelta(t.Context(), &csi.GetMetadataDeltaRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("the stream's caller gets %v", err)
	}
	if _, err := s.client.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "good"}); err != nil {
		t.Errorf("the next call gets %v", err)
	}
	for _, want := range []string{"the cellar is flooded", "so is the attic", "edge_test.go"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if n := s.calls.edge.inFlight.Load(); n != 0 {
		t.Errorf("%d calls are still counted as in flight", n)
	}
}

func TestErrorsOfServicesReachTheCallerAsCodes(t *testing.T) {
	captureLog(t, "text", 0)
	s := serve(t, &fakeServices{
		create: func(context.Context, *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
			return nil, fmt.Errorf("creating volume: %w", pool.Errorf(pool.ErrNoSpace, "pool default is full"))
		},
		delta: func(*csi.GetMetadataDeltaRequest, csi.SnapshotMetadata_GetMetadataDeltaServer) error {
			return pool.Errorf(pool.ErrOutOfRange, "offset beyond the end")
		},
	}, time.Second)
	_, err := s.client.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "a"})
	if got := status.Convert(err); got.Code() != codes.ResourceExhausted || got.Message() != "creating volume: pool default is full" {
		t.Errorf("got %v", err)
	}
	stream, err := csi.NewSnapshotMetadataClient(s.conn).GetMetadataDelta(t.Context(), &csi.GetMetadataDeltaRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.OutOfRange {
		t.Errorf("got %v", err)
	}
}

func TestNoServiceSeesARequestOverTheLimits(t *testing.T) {
	captureLog(t, "text", 0)
	long := strings.Repeat("x", 5000)
	s := serve(t, &fakeServices{
		create: func(context.Context, *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
			t.Error("CreateVolume was reached")
			return &csi.CreateVolumeResponse{}, nil
		},
		delta: func(*csi.GetMetadataDeltaRequest, csi.SnapshotMetadata_GetMetadataDeltaServer) error {
			t.Error("GetMetadataDelta was reached")
			return nil
		},
	}, time.Second)
	_, err := s.client.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: long})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	stream, err := csi.NewSnapshotMetadataClient(s.conn).GetMetadataDelta(t.Context(), &csi.GetMetadataDeltaRequest{Secrets: map[string]string{"a": long}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the stream gets %v", err)
	}

	// gRPC itself refuses what is not the protocol.
	notUTF8 := []byte{0x0a, 2, 0xff, 0xfe} // field 1, the name, of 2 bytes
	if err := s.conn.Invoke(t.Context(), csi.Controller_CreateVolume_FullMethodName, notUTF8, nil, grpc.ForceCodecV2(rawBytes{})); status.Code(err) != codes.Internal {
		t.Errorf("a name that is not UTF-8 gets %v", err)
	}
}

// rawBytes is a codec that sends bytes as they are.
type rawBytes struct{}

func (rawBytes) Name() string { return "proto" }
func (rawBytes) Marshal(v any) (mem.BufferSlice, error) {
	raw, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("%T are not raw bytes", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(raw)}, nil
}
func (rawBytes) Unmarshal(mem.BufferSlice, any) error { return errors.New("no answer was expected") }

// through sends a request through the edge to a handler.
func through(method string, request any, handler grpc.UnaryHandler) error {
	e := &edge{metrics: newCallMetrics()}
	_, err := e.unary(context.Background(), request, &grpc.UnaryServerInfo{FullMethod: method}, handler)
	return err
}

func answer(err error) grpc.UnaryHandler {
	return func(context.Context, any) (any, error) { return nil, err }
}

func TestTheLogHasOneLineForEachCallThatMatters(t *testing.T) {
	const create, capacity = csi.Controller_CreateVolume_FullMethodName, csi.Controller_GetCapacity_FullMethodName
	request := &csi.NodeStageVolumeRequest{VolumeId: "node/pool/vol"}
	for name, test := range map[string]struct {
		verbosity int
		method    string
		err       error
		lines     int
		want      []string
	}{
		"success":                  {0, create, nil, 1, []string{"I", `"Call"`, `method="/csi.v1.Controller/CreateVolume"`, `requestID="`, `volumeID="node/pool/vol"`, `duration="`, `code="OK"`}},
		"fault of the caller":      {0, create, pool.Errorf(pool.ErrInvalid, "no such pool"), 1, []string{"I", `code="InvalidArgument"`, `err="no such pool"`}},
		"try again":                {0, create, pool.ErrBusy, 1, []string{"I", `code="Aborted"`}},
		"fault of the driver":      {0, create, errors.New("disk on fire"), 1, []string{"E", `code="Internal"`, `err="disk on fire"`}},
		"damage":                   {0, create, pool.ErrDamaged, 1, []string{"E", `code="DataLoss"`}},
		"chatter":                  {3, capacity, nil, 0, nil},
		"chatter that fails":       {0, capacity, pool.ErrTimeout, 1, []string{"I", `code="DeadlineExceeded"`}},
		"chatter, asked for":       {4, capacity, nil, 1, []string{"I", `method="/csi.v1.Controller/GetCapacity"`}},
		"requests, asked for":      {5, create, nil, 2, []string{"I", `"Call begins"`, `request="{\"volume_id\":\"node/pool/vol\"}"`}},
		"an error of many lines":   {0, create, errors.New("mkfs failed:\nbad\nworse"), 1, []string{`err="mkfs failed: | bad | worse"`}},
		"an error that never ends": {0, create, errors.New(strings.Repeat("x", 1<<20)), 1, []string{strings.Repeat("x", 1024) + `…"`}},
	} {
		t.Run(name, func(t *testing.T) {
			log := captureLog(t, "text", test.verbosity)
			_ = through(test.method, request, answer(test.err))
			text := log.String()
			if n := strings.Count(text, "\n"); n != test.lines {
				t.Errorf("%d lines, want %d", n, test.lines)
			}
			if len(text) > 4096 {
				t.Errorf("the log has %d bytes", len(text))
			}
			for i, want := range test.want {
				if i == 0 && len(want) == 1 && !strings.HasPrefix(text, want) || !strings.Contains(text, want) {
					t.Errorf("lacks %s:\n%s", want, text)
				}
			}
		})
	}
}

func TestAHostileIDCannotForgeALineOfTheLog(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		log := captureLog(t, format, 0)
		_ = through(csi.Controller_DeleteVolume_FullMethodName, &csi.DeleteVolumeRequest{VolumeId: "a\nI0101 all is well\x1b[2J"}, answer(nil))
		if text := log.String(); strings.Count(text, "\n") != 1 || strings.Contains(text, "\x1b") {
			t.Errorf("%s: %q", format, text)
		}
	}
}

// Every request type of the specification is filled with a secret wherever the
// specification says that one may be, and with other text elsewhere.
func TestASecretNeverAppearsInTheLog(t *testing.T) {
	const secret, ordinary = "correct-horse-battery-staple", "ordinary"
	ends := map[string]grpc.UnaryHandler{
		"success": answer(nil),
		"error":   answer(errors.New("failed")),
		"panic":   func(context.Context, any) (any, error) { panic("fault") },
	}
	withSecrets := 0
	for _, request := range allRequests(t) {
		if fill(request, secret, ordinary) {
			withSecrets++
		}
		for _, format := range []string{"text", "json"} {
			for verbosity := range 11 {
				for name, end := range ends {
					log := captureLog(t, format, verbosity)
					_ = through("/csi.v1.Any/Method", request.Interface(), end)
					text := log.String()
					if strings.Contains(text, secret) {
						t.Fatalf("%s, %s, -v=%d, %s:\n%s", request.Descriptor().Name(), format, verbosity, name, text)
					}
					if verbosity >= int(logRequests) && !strings.Contains(text, `"Call begins"`) {
						t.Fatalf("%s: the request is not in the log at all:\n%s", request.Descriptor().Name(), text)
					}
				}
			}
		}
		if !strings.Contains(withoutSecrets(request.Interface()), ordinary) && request.Descriptor().Fields().Len() > 2 {
			t.Errorf("%s: what is no secret is not shown either", request.Descriptor().Name())
		}
	}
	if withSecrets < 20 {
		t.Errorf("only %d kinds of request have secrets; has the specification changed?", withSecrets)
	}
}

// allRequests gives one message of each request type of the specification.
func allRequests(t *testing.T) []protoreflect.Message {
	t.Helper()
	var all []protoreflect.Message
	services := csi.File_csi_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			kind, err := protoregistry.GlobalTypes.FindMessageByName(methods.Get(j).Input().FullName())
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, kind.New())
		}
	}
	return all
}

// fill sets every field of a message, and tells whether any may be a secret.
func fill(m protoreflect.Message, secret, ordinary string) (found bool) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		marked, _ := proto.GetExtension(f.Options(), csi.E_CsiSecret).(bool)
		marked = marked || f.Name() == "mount_flags"
		found = found || marked
		text := protoreflect.ValueOfString(ordinary)
		if marked {
			text = protoreflect.ValueOfString(secret)
		}
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(text.MapKey(), text)
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			element := m.Mutable(f).List().AppendMutable().Message()
			found = fill(element, secret, ordinary) || found
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			m.Mutable(f).List().Append(text)
		case f.Kind() == protoreflect.MessageKind:
			found = fill(m.Mutable(f).Message(), secret, ordinary) || found
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, text)
		}
	}
	return found
}
