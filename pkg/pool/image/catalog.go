package image

import "slices"

// catalog holds what a pool has of one kind, by name and in order of names. It
// is guarded by the engine's mutex.
type catalog[T any] struct {
	byName map[string]T
	names  []string // sorted
}

func (c *catalog[T]) get(name string) (T, bool) {
	entry, ok := c.byName[name]
	return entry, ok
}

func (c *catalog[T]) put(name string, entry T) {
	if c.byName == nil {
		c.byName = map[string]T{}
	}
	if i, found := slices.BinarySearch(c.names, name); !found {
		c.names = slices.Insert(c.names, i, name)
	}
	c.byName[name] = entry
}

func (c *catalog[T]) remove(name string) {
	if i, found := slices.BinarySearch(c.names, name); found {
		c.names = slices.Delete(c.names, i, i+1)
		delete(c.byName, name)
	}
}

// list gives the entries whose name is greater than after, at most max of them;
// max 0 is all.
func (c *catalog[T]) list(after string, max int) []T {
	i, found := slices.BinarySearch(c.names, after)
	if found {
		i++
	}
	names := c.names[i:]
	if max > 0 && len(names) > max {
		names = names[:max]
	}
	entries := make([]T, 0, len(names))
	for _, name := range names {
		entries = append(entries, c.byName[name])
	}
	return entries
}
