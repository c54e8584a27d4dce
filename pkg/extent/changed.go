package extent

import (
	"fmt"
	"iter"
)

// Range is a run of a file's bytes.
type Range struct {
	Offset, Length int64 // bytes
}

// None is the extents of a file that was never written.
func None(func([]Extent, error) bool) {}

// Changed gives the ranges of [from, to) in which two files of one filesystem
// may differ, ordered, not empty, and apart from each other. It compares where
// their bytes are, not what they are: what is in the same place is the same, and
// what was never written is zero. So a range can hold bytes that are equal (they
// were written again, or are zeros that were written), and what is outside all
// ranges is equal without doubt.
//
// Both files must exist, unwritten, from before their extents are asked for
// until the end: what a file has given back may hold another's bytes by now.
// Bytes behind a source's last extent are zeros. An error is the last that it
// gives, and then what follows the last range is unknown.
func Changed(base, target Source, from, to int64) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		a, stopA := newCursor(base)
		defer stopA()
		b, stopB := newCursor(target)
		defer stopB()
		var found Range // not given yet, because it may go on
		for at := from; at < to; {
			left, err := a.from(at, to)
			if err != nil {
				yield(Range{}, err)
				return
			}
			right, err := b.from(at, to)
			if err != nil {
				yield(Range{}, err)
				return
			}
			n := min(left.Length, right.Length)
			switch {
			case equal(left, right):
			case found.Length > 0 && found.Offset+found.Length == at:
				found.Length += n
			default:
				if found.Length > 0 && !yield(found, nil) {
					return
				}
				found = Range{at, n}
			}
			at += n
		}
		if found.Length > 0 {
			yield(found, nil)
		}
	}
}

// equal reports whether two extents that begin at the same offset must hold the
// same bytes, as far as both go.
func equal(a, b Extent) bool {
	switch a.State {
	case Reserved:
		return b.State == Reserved
	case Located:
		return b.State == Located && a.Physical == b.Physical
	default:
		return false
	}
}

// cursor walks through a source from a rising offset.
type cursor struct {
	next  func() ([]Extent, error, bool)
	batch []Extent // not passed yet
	end   int64    // of the extent before those
	ended bool
}

func newCursor(s Source) (c *cursor, stop func()) {
	c = &cursor{}
	c.next, stop = iter.Pull2(s)
	return c, stop
}

// from gives what begins at that offset, cut off at to: the rest of an extent, or
// a hole, which is like a Reserved extent.
func (c *cursor) from(at, to int64) (Extent, error) {
	for {
		for len(c.batch) == 0 && !c.ended {
			batch, err, ok := c.next()
			if err != nil {
				return Extent{}, err
			}
			c.batch, c.ended = batch, !ok
		}
		if len(c.batch) == 0 {
			return Extent{Offset: at, Length: to - at, State: Reserved}, nil
		}
		e := c.batch[0]
		if e.Offset < c.end || e.Length <= 0 {
			return Extent{}, fmt.Errorf("the filesystem tells of an extent of %d bytes at %d after one that ends at %d", e.Length, e.Offset, c.end)
		}
		if e.Offset > at {
			return Extent{Offset: at, Length: min(e.Offset, to) - at, State: Reserved}, nil
		}
		if rest, ok := e.cut(at, to); ok {
			return rest, nil
		}
		c.end, c.batch = e.end(), c.batch[1:]
	}
}
