package router

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
)

// The gRPC service through which the command asks a router that runs. Its
// messages are those that are there already; the answer of List is a [Report]
// in JSON.
//
//	service Orphans {
//	  rpc List(google.protobuf.Empty) returns (google.protobuf.Struct);
//	  rpc RemoveVolume(csi.v1.DeleteVolumeRequest) returns (csi.v1.DeleteVolumeResponse);
//	  rpc RemoveSnapshot(csi.v1.DeleteSnapshotRequest) returns (csi.v1.DeleteSnapshotResponse);
//	}
const (
	orphansService = "orlop.v1.Orphans"
	listMethod     = "List"
	removeVolume   = "RemoveVolume"
	removeSnapshot = "RemoveSnapshot"
)

// Register adds the service to a server.
func (o *Orphans) Register(to grpc.ServiceRegistrar) {
	to.RegisterService(&grpc.ServiceDesc{
		ServiceName: orphansService,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{
			method(listMethod, (*Orphans).list),
			method(removeVolume, (*Orphans).removeVolume),
			method(removeSnapshot, (*Orphans).removeSnapshot),
		},
	}, o)
}

// method is what protoc would generate.
func method[Request, Response any](name string, call func(*Orphans, context.Context, *Request) (*Response, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(service any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		r := new(Request)
		if err := decode(r); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, r any) (any, error) {
			return call(service.(*Orphans), ctx, r.(*Request)) //nolint:forcetypeassert // registered and decoded as these
		}
		if intercept == nil {
			return handle(ctx, r)
		}
		return intercept(ctx, r, &grpc.UnaryServerInfo{Server: service, FullMethod: fullMethod(name)}, handle)
	}}
}

func fullMethod(name string) string { return "/" + orphansService + "/" + name }

func (o *Orphans) list(ctx context.Context, _ *emptypb.Empty) (*structpb.Struct, error) {
	report, err := o.Scan(ctx)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(report)
	if err != nil {
		return nil, err
	}
	s := &structpb.Struct{}
	return s, protojson.Unmarshal(text, s)
}

func (o *Orphans) removeVolume(ctx context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := request.Required("volume_id", r.GetVolumeId()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, o.Remove(ctx, KindVolume, r.GetVolumeId())
}

func (o *Orphans) removeSnapshot(ctx context.Context, r *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if err := request.Required("snapshot_id", r.GetSnapshotId()); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, o.Remove(ctx, KindSnapshot, r.GetSnapshotId())
}

// OrphansClient asks a router for its orphans.
type OrphansClient struct {
	Connection grpc.ClientConnInterface
}

// List has the router scan, and gives what it found.
func (c OrphansClient) List(ctx context.Context) (Report, error) {
	s := &structpb.Struct{}
	if err := c.Connection.Invoke(ctx, fullMethod(listMethod), &emptypb.Empty{}, s, grpc.MaxCallRecvMsgSize(maxMessage)); err != nil {
		return Report{}, err
	}
	text, err := protojson.Marshal(s)
	if err != nil {
		return Report{}, err
	}
	var report Report
	if err := json.Unmarshal(text, &report); err != nil {
		return Report{}, fmt.Errorf("what the router answers: %w", err)
	}
	return report, nil
}

// Remove has the router remove an orphan.
func (c OrphansClient) Remove(ctx context.Context, k Kind, id string) error {
	switch k {
	case KindVolume:
		return c.Connection.Invoke(ctx, fullMethod(removeVolume), &csi.DeleteVolumeRequest{VolumeId: id}, &csi.DeleteVolumeResponse{})
	case KindSnapshot:
		return c.Connection.Invoke(ctx, fullMethod(removeSnapshot), &csi.DeleteSnapshotRequest{SnapshotId: id}, &csi.DeleteSnapshotResponse{})
	default:
		return pool.Errorf(pool.ErrInvalid, "%q is no kind; there are %s and %s", k, KindVolume, KindSnapshot)
	}
}
