package model

import (
	"fmt"
	"slices"
)

// Content is what a volume or a snapshot must contain: records, which a writer
// numbers from 1 on and brings to stable storage one by one, and fills, which are
// bytes at rest.
//
// A copy begins with what its source had. So the records of one volume may be of
// several writers, one after the other, and each one's writer is known.
type Content struct {
	Parts []Part
	Last  *Bounds // of the number of the last record
	Fills []Fill  // in the order in which they were written
	Live  bool    // a writer is at work
}

// Part is the records of one writer: those with a number above After, up to the
// next part's.
type Part struct {
	Writer uint64
	After  int64
}

// Bounds are what is known of a number: it is at least and at most so much. What
// has the same bytes has the same Bounds, so that what is learnt of one is known of
// all.
type Bounds struct{ Least, Most int64 }

// Fill is bytes that follow from a seed.
type Fill struct {
	Seed uint64
	Size int64
}

// NewContent is that of a volume that nobody has written to.
func NewContent() Content { return Content{Last: &Bounds{}} }

// Writer tells whose record n is; 0 is nobody's.
func (c *Content) Writer(n int64) uint64 {
	var writer uint64
	for _, p := range c.Parts {
		if n > p.After {
			writer = p.Writer
		}
	}
	return writer
}

// Learn takes in that the last record was seen to be n. It is an error if it
// cannot be.
func (c *Content) Learn(n int64) error {
	if n < c.Last.Least || n > c.Last.Most {
		return fmt.Errorf("the last record is %d, and must be from %d to %d", n, c.Last.Least, c.Last.Most)
	}
	c.Last.Least, c.Last.Most = n, n
	return nil
}

// Begin has a writer go on after the last record, which must have been learnt.
func (c *Content) Begin(writer uint64) {
	n := c.Last.Least
	c.Parts = append(slices.Clip(c.Parts), Part{Writer: writer, After: n})
	c.Last = &Bounds{n, n}
	c.Live = true
}

// Progress takes in how far the writer is: records up to safe are on stable
// storage, and those up to begun may be.
func (c *Content) Progress(safe, begun int64) {
	c.Last.Least, c.Last.Most = safe, begun
}

// End takes in that the writer has ended with record n.
func (c *Content) End(n int64) {
	c.Last.Least, c.Last.Most = n, n
	c.Live = false
}

// Seen is the content as it is now.
func (c *Content) Seen() Content {
	seen := *c
	if c.Live {
		seen.Last = &Bounds{c.Last.Least, c.Last.Most}
	}
	return seen
}

// Copy is the content of a copy. Asked is what its source had been seen to have
// when the copy was asked for, and made when it was there.
func Copy(asked, made Content) Content {
	c := Content{Parts: slices.Clone(made.Parts), Last: made.Last, Fills: slices.Clone(made.Fills)}
	if asked.Last != made.Last {
		c.Last = &Bounds{asked.Last.Least, made.Last.Most}
	}
	return c
}
