//go:build integration

package chaos

import (
	"io"
	"net"
	"sync"
	"testing"
)

// link is what a router, or another node, reaches a node through. It can be cut.
type link struct {
	to string
	l  net.Listener

	mu     sync.Mutex
	healed *sync.Cond
	state  cut
	conns  map[net.Conn]struct{}
	ended  bool
}

// cut is what is wrong with a link.
type cut int

const (
	whole  cut = iota
	broken     // connections break, and there are no new ones
	silent     // nothing arrives, and nobody is told
)

func newLink(t *testing.T, to string) *link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &link{to: to, l: l, conns: map[net.Conn]struct{}{}}
	k.healed = sync.NewCond(&k.mu)
	go k.serve()
	t.Cleanup(func() {
		l.Close()
		k.set(broken)
		k.mu.Lock()
		k.ended = true
		k.healed.Broadcast()
		k.mu.Unlock()
	})
	return k
}

func (k *link) serve() {
	for {
		from, err := k.l.Accept()
		if err != nil {
			return
		}
		go k.join(from)
	}
}

// join carries the bytes of one connection.
func (k *link) join(from net.Conn) {
	if !k.enter(from) {
		return
	}
	defer k.leave(from)
	to, err := net.Dial("tcp", k.to)
	if err != nil || !k.enter(to) {
		return
	}
	defer k.leave(to)
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
		both.Go(func() {
			_, _ = io.Copy(through{way[1], k}, way[0])
			way[0].Close()
			way[1].Close()
		})
	}
	both.Wait()
}

// enter takes a connection in, unless the link is broken.
func (k *link) enter(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.state == broken || k.ended {
		c.Close()
		return false
	}
	k.conns[c] = struct{}{}
	return true
}

func (k *link) leave(c net.Conn) {
	c.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.conns, c)
}

// through is a connection whose bytes wait while the link is silent.
type through struct {
	net.Conn

	link *link
}

func (t through) Write(p []byte) (int, error) {
	t.link.mu.Lock()
	for t.link.state == silent && !t.link.ended {
		t.link.healed.Wait()
	}
	t.link.mu.Unlock()
	return t.Conn.Write(p)
}

// set cuts the link, or makes it whole again.
func (k *link) set(state cut) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.state = state
	if state == broken {
		for c := range k.conns {
			c.Close()
		}
	}
	k.healed.Broadcast()
}
