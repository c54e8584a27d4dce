package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func TestEachKindOfErrorHasItsCode(t *testing.T) {
	for _, test := range []struct {
		err  error
		want codes.Code
	}{
		{pool.ErrInvalid, codes.InvalidArgument},
		{pool.ErrOutOfRange, codes.OutOfRange},
		{pool.ErrNotFound, codes.NotFound},
		{pool.ErrExists, codes.AlreadyExists},
		{pool.ErrBusy, codes.Aborted},
		{pool.ErrToken, codes.Aborted},
		{pool.ErrInUse, codes.FailedPrecondition},
		{pool.ErrPrecondition, codes.FailedPrecondition},
		{pool.ErrNoSpace, codes.ResourceExhausted},
		{pool.ErrDamaged, codes.DataLoss},
		{pool.ErrUnavailable, codes.Unavailable},
		{pool.ErrTimeout, codes.DeadlineExceeded},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{unix.ENOSPC, codes.ResourceExhausted},
		{unix.EDQUOT, codes.ResourceExhausted},
		{&os.PathError{Op: "write", Path: "/a", Err: unix.ENOSPC}, codes.ResourceExhausted},
		{unix.EIO, codes.Internal},
		{errors.New("anything else"), codes.Internal},
	} {
		for _, err := range []error{
			test.err,
			fmt.Errorf("doing something: %w", test.err),
			errors.Join(errors.New("and cleaning up failed"), test.err),
			pool.Errorf(test.err, "told in other words"),
		} {
			got := status.Convert(toStatus(err))
			if got.Code() != test.want || got.Message() != err.Error() {
				t.Errorf("%q becomes %s %q, want %s with the same text", err, got.Code(), got.Message(), test.want)
			}
			if len(got.Details()) != 0 {
				t.Errorf("%q has details, which the specification forbids", err)
			}
		}
	}
}

func TestTheKindThatAServiceChoseDecidesBeforeItsCause(t *testing.T) {
	err := pool.Errorf(pool.ErrUnavailable, "the disk is full for the moment: %w", unix.ENOSPC)
	if got := status.Code(toStatus(err)); got != codes.Unavailable {
		t.Errorf("got %s", got)
	}
}

func TestAStatusStaysAsItIs(t *testing.T) {
	if err := toStatus(nil); err != nil {
		t.Errorf("nil becomes %v", err)
	}
	own := status.Error(codes.Unimplemented, "no such call")
	if got := toStatus(own); got != own { //nolint:errorlint // the very same
		t.Errorf("%v becomes %v", own, got)
	}
	wrapped := fmt.Errorf("asked: %w", own)
	if got := status.Code(toStatus(wrapped)); got != codes.Unimplemented {
		t.Errorf("a wrapped status becomes %s", got)
	}
}
