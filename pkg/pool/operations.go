package pool

import (
	"slices"
	"sync"
)

// Operation is something that is done to one volume or one snapshot while
// others may want to do something else to it.
type Operation int

// The operations. Copy is a clone or a snapshot of a volume in a pool that
// cannot reflink: it reads the volume's bytes for as long as that takes. Cut is
// the same where blocks are shared: it is over in milliseconds and atomic. Hold is
// either for several volumes at one instant.
const (
	Create Operation = iota
	Delete
	Grow      // make larger
	Modify    // change limits
	Cut       // snapshot or clone by reflink
	Copy      // snapshot or clone by copying
	Hold      // snapshot together with other volumes
	Stage     // attach, format, mount
	Unstage   // unmount, detach
	Publish   // bind to one target
	Unpublish // unbind from one target
	Inspect   // statistics and health of something mounted
	operations
)

func (o Operation) String() string {
	return [operations]string{"create", "delete", "grow", "modify", "cut", "copy", "hold", "stage", "unstage", "publish", "unpublish", "inspect"}[o]
}

// overlap tells which operation may begin on a volume while another is in
// flight on the same volume; it is symmetric. Everything that is not marked is
// refused with ErrBusy, at once, and the orchestrator repeats it: nothing
// queues behind a lock.
//
//   - Nothing overlaps Create or Delete.
//   - A clone or snapshot holds its source against Delete. By reflink it may
//     meet Stage, Publish and Unpublish, because the cut is atomic whatever the
//     filesystem does; but two cuts would thaw each other's freeze, and Unstage
//     would find the mount busy that a cut has frozen, or take it away before it
//     is. By copying it must see no writer come, so Stage and Publish wait.
//   - Hold is a snapshot in a group: no writer may come or go while the other
//     volumes are held, so that it waits for all node calls, and they for it.
//   - Publish and Unpublish count the targets of a volume to keep a single
//     writer single, so they do not overlap each other or themselves.
//   - Modify enforces new limits wherever the volume is published, which no
//     publication may miss; it touches no data.
//   - Inspect only looks.
var overlap = [operations][operations]bool{
	Grow:      {Inspect: true},
	Modify:    {Cut: true, Copy: true, Inspect: true},
	Cut:       {Modify: true, Stage: true, Publish: true, Unpublish: true, Inspect: true},
	Copy:      {Modify: true, Copy: true, Inspect: true},
	Hold:      {Inspect: true},
	Stage:     {Cut: true, Inspect: true},
	Unstage:   {Inspect: true},
	Publish:   {Cut: true, Inspect: true},
	Unpublish: {Cut: true, Inspect: true},
	Inspect: {
		Grow: true, Modify: true, Cut: true, Copy: true, Hold: true, Stage: true, Unstage: true,
		Publish: true, Unpublish: true, Inspect: true,
	},
}

// Operations keeps the operations in flight of every volume and snapshot. The
// zero value is ready.
type Operations struct {
	mu       sync.Mutex
	inFlight map[string][]Operation
}

// maxKeys is on how many volumes and snapshots there may be operations at a time.
// One that goes on after its caller has left is no call in flight any more, and
// still takes a thread if it hangs in the kernel.
const maxKeys = 4000

// Begin enters an operation on key, or refuses: with ErrBusy if one in flight
// forbids it, with ErrUnavailable if there are too many. The returned function
// ends it and must be called once.
func (o *Operations) Begin(key string, op Operation) (end func(), err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.inFlight) >= maxKeys {
		return nil, Errorf(ErrUnavailable, "%s of %s must wait: %d volumes and snapshots are being worked on; see why that does not end, and repeat the call", op, key, len(o.inFlight))
	}
	for _, other := range o.inFlight[key] {
		if !overlap[op][other] {
			return nil, Errorf(ErrBusy, "%s of %s must wait: its %s has not ended; repeat the call", op, key, other)
		}
	}
	if o.inFlight == nil {
		o.inFlight = map[string][]Operation{}
	}
	o.inFlight[key] = append(o.inFlight[key], op)
	return sync.OnceFunc(func() { o.end(key, op) }), nil
}

func (o *Operations) end(key string, op Operation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	rest := o.inFlight[key]
	i := slices.Index(rest, op)
	rest = slices.Delete(rest, i, i+1)
	if len(rest) == 0 {
		delete(o.inFlight, key)
		return
	}
	o.inFlight[key] = rest
}
