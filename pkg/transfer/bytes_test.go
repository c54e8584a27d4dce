package transfer

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"math"
	"net"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func pieceOf(offset int64, size int) pool.Piece {
	data := make([]byte, size)
	_, _ = rand.Read(data)
	return pool.Piece{Offset: offset, Data: data}
}

func sent(t testing.TB, pieces ...pool.Piece) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, p := range pieces {
		if err := writePiece(&b, p); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func TestPiecesArriveAsTheyWereSent(t *testing.T) {
	pieces := []pool.Piece{
		pieceOf(0, 4096),
		pieceOf(4096, pool.PieceSize),
		pieceOf(1<<40, 3),
		pieceOf(math.MaxInt64-1, 1),
	}
	from := bytes.NewReader(sent(t, append(slices.Clone(pieces), pool.Piece{})...))
	memory := make([]byte, pool.PieceSize)
	behind := int64(0)
	for _, want := range pieces {
		got, err := readPiece(from, behind, memory)
		if err != nil {
			t.Fatal(err)
		}
		if got.Offset != want.Offset || !bytes.Equal(got.Data, want.Data) {
			t.Fatalf("%d bytes at %d arrive as %d bytes at %d", len(want.Data), want.Offset, len(got.Data), got.Offset)
		}
		behind = got.Offset + int64(len(got.Data))
	}
	if _, err := readPiece(from, behind, memory); !errors.Is(err, io.EOF) || from.Len() > 0 {
		t.Errorf("the end is %v, and %d bytes are left", err, from.Len())
	}
}

// A stream that breaks off is never taken for one that has ended.
func TestAStreamThatBreaksOffIsToldFromOneThatEnds(t *testing.T) {
	whole := sent(t, pieceOf(0, 100), pool.Piece{})
	for n := range whole {
		from, memory := bytes.NewReader(whole[:n]), make([]byte, pool.PieceSize)
		_, err := readPiece(from, 0, memory)
		if err == nil {
			_, err = readPiece(from, 0, memory)
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			t.Fatalf("after %d of %d bytes: %v, want %v", n, len(whole), err, io.ErrUnexpectedEOF)
		}
	}
}

func TestAPieceThatIsNotWhatWasSentIsRefused(t *testing.T) {
	good := sent(t, pieceOf(4096, 512))
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x10
		p, err := readPiece(bytes.NewReader(bad), 4096, make([]byte, pool.PieceSize))
		// Where it belongs is not under the checksum, but under that of TLS.
		if err == nil && (at >= 8 || p.Offset < 4096) {
			t.Errorf("a bit of byte %d changes, and nothing is said", at)
		}
	}
	for what, stream := range map[string][]byte{
		"before what there is": sent(t, pieceOf(4095, 10)),
		"a negative offset":    sent(t, pieceOf(-1, 10)),
		"more than a piece":    sent(t, pieceOf(1<<20, pool.PieceSize+1)),
	} {
		if _, err := readPiece(bytes.NewReader(stream), 4096, make([]byte, pool.PieceSize)); !errors.Is(err, errCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// What a node sends does no more than fail, and what is taken for a piece is one.
func FuzzReadPiece(f *testing.F) {
	f.Add(sent(f, pieceOf(0, 100), pieceOf(4096, 30), pool.Piece{}))
	f.Add(sent(f, pieceOf(-1, 1)))
	f.Fuzz(func(t *testing.T, stream []byte) {
		from, memory := bytes.NewReader(stream), make([]byte, pool.PieceSize)
		var read []byte
		for behind := int64(0); ; {
			p, err := readPiece(from, behind, memory)
			if err != nil {
				break
			}
			if p.Offset < behind || len(p.Data) == 0 {
				t.Fatalf("%d bytes at %d, behind %d", len(p.Data), p.Offset, behind)
			}
			behind = p.Offset
			read = append(read, sent(t, p)...)
		}
		if !bytes.HasPrefix(stream, read) {
			t.Error("what was read is not what was sent")
		}
	})
}

// opened gives both ends of a connection for bytes: that of who opened it, who
// says its name, and the other.
func opened(t *testing.T, name []byte) (ours, theirs net.Conn) {
	t.Helper()
	theirs, ours = net.Pipe()
	t.Cleanup(func() { _, _ = theirs.Close(), ours.Close() })
	go func() { _, _ = theirs.Write(name) }()
	return ours, theirs
}

func named(b byte) []byte { return bytes.Repeat([]byte{b}, nameSize) }

func TestAConnectionAndItsCallMeetWhicheverComesFirst(t *testing.T) {
	for _, callFirst := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c := NewConnections()
			ours, _ := opened(t, named(1))
			add := func() {
				if err := c.Add("node-1", ours); err != nil {
					t.Error(err)
				}
			}
			if callFirst {
				go func() {
					synctest.Wait()
					add()
				}()
			} else {
				add()
			}
			got, err := c.take(t.Context(), "node-1", named(1))
			if err != nil || got != ours {
				t.Errorf("the call first: %t: %v, the connection: %t", callFirst, err, got == ours)
			}
			if len(c.awaited) > 0 {
				t.Errorf("the call first: %t: %d are awaited", callFirst, len(c.awaited))
			}
		})
	}
}

// A name is good for the node that opened the connection alone, and once.
func TestAConnectionIsGivenToItsOpenerOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewConnections()
		ours, _ := opened(t, named(1))
		if err := c.Add("node-1", ours); err != nil {
			t.Fatal(err)
		}
		again, theirs := opened(t, named(1))
		if err := c.Add("node-1", again); err == nil {
			t.Error("two connections may have one name")
		}
		if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the second of that name is not closed: %v", err)
		}
		for _, opener := range []string{"node-2", ""} {
			if _, err := c.take(t.Context(), opener, named(1)); !errors.Is(err, pool.ErrUnavailable) {
				t.Errorf("node %q takes the connection of node-1: %v", opener, err)
			}
		}
	})
}

func TestAConnectionThatNobodyAsksForIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewConnections()
		ours, theirs := opened(t, named(1))
		if err := c.Add("node-1", ours); err != nil {
			t.Fatal(err)
		}
		if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("it is not closed: %v", err)
		}
		if len(c.awaited) > 0 {
			t.Errorf("%d are awaited", len(c.awaited))
		}
		if _, err := c.take(t.Context(), "node-1", named(1)); !errors.Is(err, pool.ErrUnavailable) {
			t.Errorf("it is given all the same: %v", err)
		}
		if len(c.awaited) > 0 {
			t.Errorf("%d are awaited", len(c.awaited))
		}
	})
}

func TestANameThatIsNoneIsRefused(t *testing.T) {
	c := NewConnections()
	for _, name := range [][]byte{nil, {}, named(1)[1:], append(named(1), 1)} {
		if _, err := c.take(t.Context(), "node-1", name); !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("a name of %d bytes: %v", len(name), err)
		}
	}
	theirs, ours := net.Pipe()
	go func() {
		_, _ = theirs.Write(named(1)[1:])
		_ = theirs.Close()
	}()
	if err := c.Add("node-1", ours); err == nil || len(c.awaited) > 0 {
		t.Errorf("a connection without its whole name: %v, %d are awaited", err, len(c.awaited))
	}
}
