package driver

import (
	"context"
	"crypto/rand"
	"errors"
	"path"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"k8s.io/klog/v2"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// The verbosity from which on the log has more than one line for each call that
// matters.
const (
	logChatter  klog.Level = 4 // calls that orchestrators repeat all day
	logRequests klog.Level = 5 // requests in full, without their secrets
)

// chatter is the calls that an orchestrator repeats without anybody having asked
// for something.
var chatter = map[string]bool{
	"GetPluginInfo":                  true,
	"GetPluginCapabilities":          true,
	"Probe":                          true,
	"ControllerGetCapabilities":      true,
	"ControllerGetVolume":            true,
	"ControllerListVolumeHealth":     true,
	"GetCapacity":                    true,
	"GetVolumeGroupSnapshot":         true,
	"GroupControllerGetCapabilities": true,
	"ListSnapshots":                  true,
	"ListVolumes":                    true,
	"NodeGetCapabilities":            true,
	"NodeGetInfo":                    true,
	"NodeGetStorageHealth":           true,
	"NodeGetVolumeHealth":            true,
	"NodeGetVolumeStats":             true,
}

// subjects is the request fields that tell what a call is about, and their
// names in the log.
var subjects = []struct {
	field protoreflect.Name
	key   string
}{
	{"name", "name"},
	{"volume_id", "volumeID"},
	{"snapshot_id", "snapshotID"},
	{"group_snapshot_id", "groupSnapshotID"},
	{"source_volume_id", "sourceVolumeID"},
	{"base_snapshot_id", "baseSnapshotID"},
	{"target_snapshot_id", "targetSnapshotID"},
}

// maxInFlight is how many calls there may be at a time: far more than any
// orchestrator makes, and far fewer than the threads that a Go program may have
// (runtime/debug.SetMaxThreads), of which each call takes one that hangs in the
// kernel.
const maxInFlight = 2000

// edge is what every call passes on its way in and out: it checks the size of
// what is asked, makes a panic or an error a status, and tells the log and the
// metrics how the call ended. Nothing further in logs.
type edge struct {
	metrics  *callMetrics
	inFlight atomic.Int64
	// guard refuses callers; nil refuses none.
	guard func(ctx context.Context, method string) error
}

func (e *edge) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (response any, err error) {
	c := e.begin(info.FullMethod)
	defer func() { err = c.end(recover(), err) }()
	if err := e.admit(ctx, c); err != nil {
		return nil, err
	}
	if err := c.receive(request); err != nil {
		return nil, err
	}
	return handler(ctx, request)
}

func (e *edge) stream(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	c := e.begin(info.FullMethod)
	defer func() { err = c.end(recover(), err) }()
	if err := e.admit(stream.Context(), c); err != nil {
		return err
	}
	return handler(service, &checkedStream{stream, c})
}

func (e *edge) admit(ctx context.Context, c *call) error {
	if e.guard != nil {
		if err := e.guard(ctx, c.method); err != nil {
			return err
		}
	}
	// Whether the driver is there is asked by who would end it if it were not.
	if n := e.inFlight.Load(); n > maxInFlight && !strings.HasPrefix(c.method, "/csi.v1.Identity/") {
		return pool.Errorf(pool.ErrUnavailable, "%d calls are in flight, and no more than %d may be: see why they do not end, and repeat the call", n-1, maxInFlight)
	}
	return nil
}

// checkedStream is a stream whose incoming messages pass the edge.
type checkedStream struct {
	grpc.ServerStream
	call *call
}

func (s *checkedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.call.receive(m)
}

// call is one call in flight.
type call struct {
	edge   *edge
	method string // as /csi.v1.Controller/CreateVolume
	id     string // ties the lines of the log together
	about  []any  // keys and values for the log
	start  time.Time
}

func (e *edge) begin(method string) *call {
	e.inFlight.Add(1)
	return &call{edge: e, method: method, id: rand.Text()[:8], start: time.Now()}
}

// receive checks a request and notes what it is about.
func (c *call) receive(request any) error {
	m, ok := request.(proto.Message)
	if !ok {
		return status.Errorf(codes.Internal, "request of type %T", request)
	}
	fields := m.ProtoReflect().Descriptor().Fields()
	for _, s := range subjects {
		if f := fields.ByName(s.field); f != nil && m.ProtoReflect().Has(f) {
			c.about = append(c.about, s.key, brief(m.ProtoReflect().Get(f).String()))
		}
	}
	if klog.V(logRequests).Enabled() {
		klog.InfoS("Call begins", "method", c.method, "requestID", c.id, "request", withoutSecrets(m))
	}
	return checkLimits(m)
}

// end gives the status that the caller gets for what the service returned, and
// reports it.
func (c *call) end(panicked any, err error) error {
	if panicked != nil {
		klog.ErrorS(nil, "Panic", "method", c.method, "requestID", c.id, "panic", panicked, "stack", string(debug.Stack()))
		err = status.Errorf(codes.Internal, "the driver has a fault that its log shows under request id %s", c.id)
	}
	if err != nil {
		err = toStatus(err)
	}
	code, took := status.Code(err), time.Since(c.start)
	c.edge.metrics.observe(c.method, code, took)
	c.edge.inFlight.Add(-1)

	about := append([]any{"method", c.method, "requestID", c.id}, c.about...)
	about = append(about, "duration", took.Round(time.Microsecond).String(), "code", code.String())
	switch {
	case isFault(code):
		klog.ErrorS(errors.New(brief(status.Convert(err).Message())), "Call", about...)
	case err != nil:
		klog.InfoS("Call", append(about, "err", brief(status.Convert(err).Message()))...)
	case chatter[path.Base(c.method)]:
		klog.V(logChatter).InfoS("Call", about...)
	default:
		klog.InfoS("Call", about...)
	}
	return err
}

// isFault tells the codes that somebody has to look into from those that tell
// the caller to do something else, or to repeat it.
func isFault(code codes.Code) bool {
	return code == codes.Internal || code == codes.DataLoss || code == codes.Unknown
}

// brief makes a text that a caller or another program chose fit a line of the
// log.
func brief(s string) string {
	const most = 1024
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.ReplaceAll(strings.TrimSpace(s), "\n", " | ")
}

// withoutSecrets gives a request as one line of JSON without what must not be
// told: the fields that the specification marks as secret, and mount flags, of
// which it says that they may be (VolumeCapability.MountVolume).
func withoutSecrets(request proto.Message) string {
	request = proto.Clone(request)
	walk("", request.ProtoReflect(), func(_ string, field protoreflect.FieldDescriptor, value protoreflect.Value) {
		if field.Name() == "mount_flags" {
			flags := value.List()
			for i := range flags.Len() {
				flags.Set(i, protoreflect.ValueOfString("***stripped***"))
			}
		}
	})
	return protosanitizer.StripSecrets(request).String()
}
