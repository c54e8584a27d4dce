package pool

import (
	"errors"
	"fmt"
)

// The kinds of failure that callers tell apart. Every error that an engine or a
// service returns on purpose wraps exactly one of them; package driver turns
// the kind into a gRPC code, and nothing else does.
var (
	ErrInvalid      = errors.New("invalid argument")    // the request can never succeed as it is
	ErrOutOfRange   = errors.New("out of range")        // a size or an offset that cannot be had
	ErrNotFound     = errors.New("not found")           // no such volume, snapshot or path
	ErrExists       = errors.New("already exists")      // the name is taken by something else
	ErrBusy         = errors.New("operation in flight") // a conflicting call has not ended; repeat later
	ErrToken        = errors.New("invalid token")       // a list's starting token that no list gave out
	ErrInUse        = errors.New("in use")              // attached, mounted or open; nothing was altered
	ErrNoSpace      = errors.New("no space")            // the pool cannot hold it
	ErrPrecondition = errors.New("precondition failed") // possible, but not in the present state
	ErrDamaged      = errors.New("damaged")             // what is on disk cannot be trusted; it was left alone
	ErrUnavailable  = errors.New("unavailable")         // may succeed later without anybody's help
	ErrTimeout      = errors.New("timed out")           // a bounded wait ended; the work may go on
)

// Errorf makes an error of the given kind whose text is the formatted message
// alone: errors.Is(err, kind) holds, and the reader is not told twice. It
// understands %w like fmt.Errorf.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind: kind, err: fmt.Errorf(format, args...)}
}

// Kind gives the kind of an error: the outermost, where errors of several kinds
// are wrapped in each other, and the first of errors that were joined. It is
// nil for an error without one.
func Kind(err error) error {
	if k, ok := errors.AsType[*kindError](err); ok {
		return k.kind
	}
	return nil
}

type kindError struct{ kind, err error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// JoinErrors is errors.Join in one line of text.
func JoinErrors(errs ...error) error {
	var all error
	for _, err := range errs {
		switch {
		case err == nil:
		case all == nil:
			all = err
		default:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}
