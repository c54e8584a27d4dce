package router

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// at says in an error which node it comes from, and keeps its code. A node or a
// connection that gave up by itself, while the caller still waits, is
// UNAVAILABLE: DEADLINE_EXCEEDED and CANCELLED are the caller's own.
func at(ctx context.Context, m member, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	code := s.Code()
	if ended(ctx) == nil && (code == codes.DeadlineExceeded || code == codes.Canceled) {
		code = codes.Unavailable
	}
	return status.Error(code, fmt.Sprintf("node %s: %s", m.Segment, s.Message()))
}

// said is the message of a node's answer, for an error that has another code: a
// status that is wrapped would bring its own along.
func said(err error) string { return status.Convert(err).Message() }

// sameDeadline is how much earlier than here a deadline can be over for a node,
// which is told of it and counts for itself.
const sameDeadline = 50 * time.Millisecond

// ended tells why the caller waits no longer, or is as good as gone; nil if it
// still waits.
func ended(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && ctx.Err() == nil && time.Until(deadline) < sameDeadline {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// is reports whether a node answered with a code.
func is(err error, code codes.Code) bool { return status.Code(err) == code }

// tells reports whether an answer is the word of the node's service on what it
// was asked, and not a sign that the question or the answer was lost.
func tells(err error) bool {
	switch status.Code(err) {
	case codes.OK, codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.DataLoss,
		codes.InvalidArgument, codes.OutOfRange, codes.FailedPrecondition:
		return true
	default: // UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL as after a panic, …
		return false
	}
}
