package image

import "sync"

// together runs one thing for many: who asks while it runs gets, with all others
// that have asked by then, the next run, which begins after that. So what each has
// done before it asks is done before the run that it waits for. It suits an fsync(2)
// of a directory that many calls change at once, which takes as long for all of the
// changes as for one.
type together struct {
	run func() error

	mu      sync.Mutex
	running bool
	next    *joint // nil if nobody waits for the next run
}

// joint is a run that somebody waits for; err is valid once done is closed.
type joint struct {
	done chan struct{}
	err  error
}

// do waits for a run that begins after the call of do, and gives its error.
func (t *together) do() error {
	t.mu.Lock()
	if t.running {
		if t.next == nil {
			t.next = &joint{done: make(chan struct{})}
		}
		mine := t.next
		t.mu.Unlock()
		<-mine.done
		return mine.err
	}
	t.running = true
	t.mu.Unlock()
	defer t.hand()
	return t.run()
}

// hand ends a run, and begins the next one if somebody waits for it.
func (t *together) hand() {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.next
	t.next = nil
	if next == nil {
		t.running = false
		return
	}
	go func() {
		next.err = t.run()
		close(next.done)
		t.hand()
	}()
}
