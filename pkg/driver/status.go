package driver

import (
	"cmp"
	"context"
	"errors"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// kindCodes gives the gRPC code of each kind of error, after the error tables
// of the CSI specification.
//
// Damage is DATA_LOSS and not FAILED_PRECONDITION, because orchestrators take
// the latter for "in use" and wait for the user to go away (external-resizer
// does so for an expansion), and not INTERNAL, which would look like a fault of
// the driver. The sidecars treat DATA_LOSS as final: they report it, retry with
// growing delays, and do not take the volume for one that may exist elsewhere.
var kindCodes = []struct {
	kind error
	code codes.Code
}{
	{pool.ErrInvalid, codes.InvalidArgument},
	{pool.ErrOutOfRange, codes.OutOfRange},
	{pool.ErrNotFound, codes.NotFound},
	{pool.ErrExists, codes.AlreadyExists},
	{pool.ErrBusy, codes.Aborted},
	{pool.ErrToken, codes.Aborted}, // "invalid starting_token" of ListVolumes and ListSnapshots
	{pool.ErrInUse, codes.FailedPrecondition},
	{pool.ErrPrecondition, codes.FailedPrecondition},
	{pool.ErrNoSpace, codes.ResourceExhausted},
	{pool.ErrDamaged, codes.DataLoss},
	{pool.ErrUnavailable, codes.Unavailable},
	{pool.ErrTimeout, codes.DeadlineExceeded},

	// What nobody gave a kind, but tells for itself.
	{unix.ENOSPC, codes.ResourceExhausted},
	{unix.EDQUOT, codes.ResourceExhausted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus turns the error of a service into the gRPC status that the caller
// gets. One that is a status already stays as it is; nil stays nil.
func toStatus(err error) error {
	if _, is := status.FromError(err); is {
		return err
	}
	decisive := cmp.Or(pool.Kind(err), err)
	for _, k := range kindCodes {
		if errors.Is(decisive, k.kind) {
			return status.Error(k.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}
