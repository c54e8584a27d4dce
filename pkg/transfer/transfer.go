// Package transfer brings the bytes of snapshots from one node to another: the
// service that gives them, and the volumes that are being made of them.
//
// It opens no file and no volume. What is given and what is made of it is the
// business of the engines, and who may read is that of the router's tickets.
package transfer

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// Options is how volumes are made of what is on other nodes.
type Options struct {
	// Dial connects to the node with that topology segment at that address
	// for calls, and Open for bytes; see Protocol. Without them, nothing is
	// copied from other nodes.
	Dial func(segment, address string) (*grpc.ClientConn, error)
	Open func(ctx context.Context, segment, address string) (net.Conn, error)
	// Bandwidth bounds what all copies to this node take together, in bytes
	// per second; 0 is no bound.
	Bandwidth int64
	// Abandon is for how long a copy that nobody asks for goes on, and after
	// that what it has brought is kept.
	Abandon time.Duration
	// Report tells what becomes of copies.
	Report func(message string, err error, about ...any)
}

// DefaultAbandon is longer than any orchestrator waits between two tries; the
// sidecars of Kubernetes wait five minutes at most.
const DefaultAbandon = 15 * time.Minute

// Copies are the volumes that are being copied to this node.
type Copies struct {
	options  Options
	limiter  *rate.Limiter
	received atomic.Int64 // bytes

	mu    sync.Mutex
	known map[string]*Copy     // by the volume's name
	asked map[string]time.Time // when something was last asked for, by name
}

// Copy is one of them.
type Copy struct {
	copies *Copies
	volume string // request name
	from   string // where the source is
	cancel context.CancelCauseFunc
	begun  time.Time

	mu    sync.Mutex
	order *peerapi.CopyOrder // the latest, whose ticket is good for longest
	asked time.Time

	done, size, received atomic.Int64 // of the snapshot: bytes behind us, all, and what came over
}

// New makes room for copies.
func New(o Options) *Copies {
	c := &Copies{options: o, known: map[string]*Copy{}, asked: map[string]time.Time{}}
	c.limiter = rate.NewLimiter(rate.Inf, pool.PieceSize)
	if o.Bandwidth > 0 {
		c.limiter.SetLimit(rate.Limit(o.Bandwidth))
	}
	if o.Abandon <= 0 {
		c.options.Abandon = DefaultAbandon
	}
	if o.Report == nil {
		c.options.Report = func(string, error, ...any) {}
	}
	return c
}

// InFlight tells how many copies are on their way, and Received how many bytes
// have come from other nodes since the start.
func (c *Copies) InFlight() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.known)
}

// Received implements what InFlight says.
func (c *Copies) Received() int64 { return c.received.Load() }

// Abandon is how long what nobody asks for is kept.
func (c *Copies) Abandon() time.Duration { return c.options.Abandon }

// Begin enters a copy of a source, which is on another node if there is an order
// and in another pool of this one if not. Its context ends when nobody asks for
// the volume any more. end must be called with what came of it.
func (c *Copies) Begin(ctx context.Context, requestName, from string, order *peerapi.CopyOrder) (_ context.Context, one *Copy, end func(error)) {
	ctx, cancel := context.WithCancelCause(ctx)
	now := time.Now()
	one = &Copy{
		copies: c, volume: requestName, from: from, cancel: cancel, begun: now,
		order: order, asked: now,
	}
	name := pool.NameFor(requestName)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[name] = one
	c.options.Report("Copy begins", nil, "volume", requestName, "from", from)
	return ctx, one, func(err error) {
		cancel(nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.known, name)
		c.asked[name] = time.Now()
		c.options.Report("Copy ends", err, "volume", requestName, "from", from,
			"received", one.received.Load(), "duration", time.Since(one.begun).Round(time.Millisecond).String())
	}
}

// Ask notes that somebody wants a volume that may be on its way. If it is, how
// far it is comes back as pool.ErrBusy.
func (c *Copies) Ask(requestName string, order *peerapi.CopyOrder) error {
	c.mu.Lock()
	one := c.known[pool.NameFor(requestName)]
	c.mu.Unlock()
	if one == nil {
		return nil
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	one.asked = time.Now()
	if order != nil {
		one.order = order
	}
	return one.progress()
}

// latest is the order of the call that asked last.
func (c *Copy) latest() *peerapi.CopyOrder {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.order
}

// Progress tells how far the volume of that name is, as pool.ErrBusy; nil if it
// is not on its way. To look is not to ask for it.
func (c *Copies) Progress(name string) error {
	c.mu.Lock()
	one := c.known[name]
	c.mu.Unlock()
	if one == nil {
		return nil
	}
	return one.progress()
}

func (c *Copy) progress() error {
	return pool.Errorf(pool.ErrBusy, "volume %s is being copied from %s: %d of %d MiB are behind it; repeat the call", c.volume, c.from, c.done.Load()>>20, c.size.Load()>>20)
}

// Advance notes how far a copy is of how much, in bytes. For one whose source is
// on this node; the others do so by themselves.
func (c *Copy) Advance(done, size int64) {
	c.done.Store(done)
	c.size.Store(size)
}

// Use notes that what has this name, a snapshot for copying or what a copy has
// brought, is of use.
func (c *Copies) Use(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked[name] = time.Now()
}

// Sweep gives up the copies that nobody has asked for lately.
func (c *Copies) Sweep(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, one := range c.known {
		one.mu.Lock()
		if now.Sub(one.asked) > c.options.Abandon {
			one.cancel(pool.Errorf(pool.ErrTimeout, "nobody has asked for volume %s for %s: its copy is given up", one.volume, c.options.Abandon))
		}
		one.mu.Unlock()
	}
}

// Wanted reports whether what has this name is on its way or was of use lately.
// What an earlier process left counts as of use when it is first asked about.
func (c *Copies) Wanted(name string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known[name] != nil {
		return true
	}
	at, ok := c.asked[name]
	if !ok {
		c.asked[name] = now
		return true
	}
	return now.Sub(at) <= c.options.Abandon
}

// Forget ends the memory of something that is gone.
func (c *Copies) Forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.asked, name)
}
