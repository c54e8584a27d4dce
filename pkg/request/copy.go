package request

import (
	"context"
	"fmt"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/pkg/peerapi"
)

// The gRPC metadata keys with which the router tells a node, in the call that
// makes a volume, of a source that is on another node; and the node of the
// source, in the call that makes a snapshot, that it is for such a copy only.
const (
	copyOrder = "orlop-copy-bin"
	forCopy   = "orlop-for-copy"
)

// WithCopyOrder makes a call of CreateVolume whose source is on another node.
func WithCopyOrder(ctx context.Context, o *peerapi.CopyOrder) (context.Context, error) {
	text, err := proto.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("ordering a copy: %w", err)
	}
	return metadata.AppendToOutgoingContext(ctx, copyOrder, string(text)), nil
}

// CopyOrder gives the order of a call, nil if it has none.
func CopyOrder(ctx context.Context) (*peerapi.CopyOrder, error) {
	values := metadata.ValueFromIncomingContext(ctx, copyOrder)
	if len(values) == 0 {
		return nil, nil
	}
	o := &peerapi.CopyOrder{}
	if err := proto.Unmarshal([]byte(values[0]), o); err != nil {
		return nil, fmt.Errorf("the order of a copy: %w", err)
	}
	return o, nil
}

// WithForCopy makes a call of CreateSnapshot whose snapshot is only there to be
// copied to another node, and goes by itself when nobody reads it any more.
func WithForCopy(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, forCopy, "true")
}

// ForCopy reports whether a call is such a one.
func ForCopy(ctx context.Context) bool {
	return len(metadata.ValueFromIncomingContext(ctx, forCopy)) > 0
}

// CopyName is the request name of the snapshot that a clone of a volume is copied
// from, by that of the clone: a retry finds the first try's.
func CopyName(volumeRequestName string) string { return "copy/" + volumeRequestName }
