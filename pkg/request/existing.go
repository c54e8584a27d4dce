package request

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// existingOnly is the gRPC metadata key with which the router asks a node for a
// volume or snapshot of the request's name without having one made.
const existingOnly = "orlop-existing-only"

// WithExistingOnly makes a create call that answers NOT_FOUND instead of
// creating something.
func WithExistingOnly(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, existingOnly, "true")
}

// ExistingOnly reports whether a call is such a one.
func ExistingOnly(ctx context.Context) bool {
	return len(metadata.ValueFromIncomingContext(ctx, existingOnly)) > 0
}
