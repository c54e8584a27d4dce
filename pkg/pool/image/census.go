package image

import (
	"path"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// recount is how many images a census measures again that nobody has said
// anything about: in case somebody has changed them by hand.
const recount = 64

// census is what the images of a pool take of a filesystem that it shares with
// others, without a look at all of them each time: what is attached may have
// changed, and what the driver has worked on; the rest is as it was.
type census struct {
	counted      map[string]count // by directory in the pool
	certain, sum int64            // of those counted; see occupied
	next         string           // volume after which to go on with the recount
}

// count is what one image takes.
type count struct {
	bytes   int64
	certain bool // no block of it is another's as well
}

// enterVolume puts a volume into the catalog, as it is now. Like all that follow
// it is called with the engine's mutex.
func (e *Engine) enterVolume(v pool.Volume) {
	e.volumes.put(v.Name, v)
	e.worked(path.Join(volumesDir, v.Name))
}

func (e *Engine) dropVolume(name string) {
	e.volumes.remove(name)
	e.worked(path.Join(volumesDir, name))
}

func (e *Engine) enterSnapshot(s snapshot) {
	e.snapshots.put(s.Name, s)
	e.worked(path.Join(snapshotsDir, s.Name))
}

func (e *Engine) dropSnapshot(name string) {
	e.snapshots.remove(name)
	e.worked(path.Join(snapshotsDir, name))
}

// worked has the next census measure an image again.
func (e *Engine) worked(dir string) {
	if !e.source.exclusive {
		e.touched[dir] = struct{}{}
	}
}

// occupied adds up the blocks of the pool's images. Where images share blocks
// the sum is too much; certain leaves out every image that may share with one
// that it counts, so that it is never more than the pool really takes, and what
// others take is never underrated. The caller holds the mutex of the sample.
func (e *Engine) occupied() (certain, sum int64) {
	c := &e.sample.census
	attached := e.seen.volumes()
	e.mu.Lock()
	look := e.touched
	e.touched = map[string]struct{}{}
	turn := e.volumes.list(c.next, recount)
	e.mu.Unlock()
	for _, name := range attached {
		look[path.Join(volumesDir, name)] = struct{}{}
	}
	c.next = "" // begin again
	for _, v := range turn {
		look[path.Join(volumesDir, v.Name)] = struct{}{}
		c.next = v.Name
	}
	if c.counted == nil {
		c.counted = map[string]count{}
	}
	for dir := range look {
		c.count(dir, count{})
		if private, there := e.private(dir); there {
			c.count(dir, count{e.blocks(path.Join(dir, dataFile)), private})
		}
	}
	return c.certain, c.sum
}

// private tells whether the image in a directory of the pool shares no block
// with another that is private.
func (e *Engine) private(dir string) (private, there bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if path.Dir(dir) == snapshotsDir {
		_, there = e.snapshots.get(path.Base(dir))
		return !e.info.Reflink, there
	}
	v, there := e.volumes.get(path.Base(dir))
	return !e.info.Reflink || v.Source == (pool.Source{}), there
}

// count replaces what is known of one image; the zero value is none.
func (c *census) count(dir string, now count) {
	before := c.counted[dir]
	c.sum += now.bytes - before.bytes
	if before.certain {
		c.certain -= before.bytes
	}
	if now.certain {
		c.certain += now.bytes
	}
	if now == (count{}) {
		delete(c.counted, dir)
		return
	}
	c.counted[dir] = now
}
