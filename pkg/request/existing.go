package request

import (
	"context"

	"google.golang.org/grpc"
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

// holdsPool is the gRPC metadata key with which a node tells the router, beside
// its answer, that it has the pool of the volume that it was asked for, so that
// no other node can have the volume.
const holdsPool = "orlop-holds-pool"

// TellHoldsPool tells so with the answer to the call of ctx.
func TellHoldsPool(ctx context.Context) {
	// It fails only for a call that does not come over gRPC, which no router
	// makes.
	_ = grpc.SetTrailer(ctx, metadata.Pairs(holdsPool, "true"))
}

// HoldsPool reports whether an answer's trailer tells so.
func HoldsPool(trailer metadata.MD) bool { return len(trailer.Get(holdsPool)) > 0 }
