package filesystem

import (
	"context"
	"fmt"
	"sync"
)

// Calls into the kernel that have not returned, by what they do. The channel is
// closed when the call returns.
var (
	callsMu sync.Mutex
	calls   = map[string]chan struct{}{}
)

// within runs call, and stops waiting for it when ctx ends; call itself goes on
// until the kernel lets it. Every error says what was being done.
//
// A result that comes too late is handed to undo, which may be nil. The same
// thing is never under way twice: the second waits for the first. So a wedged
// filesystem that is asked for its usage every minute costs one thread, not one
// a minute until the process has none left.
func within[T any](ctx context.Context, what string, call func() (T, error), undo func(T)) (T, error) {
	var none T
	if err := begin(ctx, what); err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	type outcome struct {
		value T
		err   error
	}
	// Unbuffered: an outcome is either received or undone, never both.
	outcomes := make(chan outcome)
	go func() {
		defer end(what)
		value, err := call()
		select {
		case outcomes <- outcome{value, err}:
		case <-ctx.Done():
			if err == nil && undo != nil {
				undo(value)
			}
		}
	}()
	select {
	case o := <-outcomes:
		if o.err != nil {
			return none, fmt.Errorf("%s: %w", what, o.err)
		}
		return o.value, nil
	case <-ctx.Done():
		return none, fmt.Errorf("%s: %w", what, ctx.Err())
	}
}

func begin(ctx context.Context, what string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	for {
		callsMu.Lock()
		earlier, busy := calls[what]
		if !busy {
			calls[what] = make(chan struct{})
		}
		callsMu.Unlock()
		if !busy {
			return nil
		}
		select {
		case <-earlier:
		case <-ctx.Done():
			return fmt.Errorf("an earlier try has not returned from the kernel: %w", ctx.Err())
		}
	}
}

func end(what string) {
	callsMu.Lock()
	defer callsMu.Unlock()
	close(calls[what])
	delete(calls, what)
}
