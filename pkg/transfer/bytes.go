package transfer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"sync"
	"time"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Protocol tells a connection for bytes from one for calls, in the TLS handshake
// (ALPN, RFC 7301). Who opens it sends its name first, nameSize random bytes,
// which is how the call refers to it. Then the other side gives pieces, each with
// a header; one without data is the end, after which who opened it closes it.
const Protocol = "orlop-bytes/1"

const (
	nameSize   = 16
	headerSize = 8 + 4 + 4 // offset, length in bytes, and CRC-32C of the data; big-endian
)

// patience is how long a connection and its call wait for each other.
const patience = 10 * time.Second

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errCorrupt is a piece that is not what its checksum says. What is on the disk
// there may be good, so that it is read again.
var errCorrupt = pool.Errorf(pool.ErrDamaged, "what was read does not have its checksum")

// writePiece sends a piece, or without data the end.
func writePiece(to io.Writer, p pool.Piece) error {
	header := make([]byte, 0, headerSize)
	header = binary.BigEndian.AppendUint64(header, uint64(p.Offset))
	header = binary.BigEndian.AppendUint32(header, uint32(len(p.Data)))
	header = binary.BigEndian.AppendUint32(header, crc32.Checksum(p.Data, castagnoli))
	if _, err := to.Write(header); err != nil || len(p.Data) == 0 {
		return err
	}
	_, err := to.Write(p.Data)
	return err
}

// readPiece receives a piece that is to lie behind an offset, into memory for
// pool.PieceSize bytes. At the end it is io.EOF; a connection that breaks is
// io.ErrUnexpectedEOF or the network's error.
func readPiece(from io.Reader, behind int64, memory []byte) (pool.Piece, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(from, header[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return pool.Piece{}, err
	}
	offset := int64(binary.BigEndian.Uint64(header[0:]))
	length := binary.BigEndian.Uint32(header[8:])
	if length == 0 {
		return pool.Piece{}, io.EOF
	}
	if offset < behind || length > pool.PieceSize {
		return pool.Piece{}, fmt.Errorf("%d bytes at %d, behind %d: %w", length, offset, behind, errCorrupt)
	}
	data := memory[:length]
	if n, err := io.ReadFull(from, data); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return pool.Piece{}, fmt.Errorf("after %d of %d bytes at %d: %w", n, length, offset, err)
	}
	if crc32.Checksum(data, castagnoli) != binary.BigEndian.Uint32(header[12:]) {
		return pool.Piece{}, fmt.Errorf("%d bytes at %d: %w", length, offset, errCorrupt)
	}
	return pool.Piece{Offset: offset, Data: data}, nil
}

// Connections are those for bytes that were opened to this node, until a call
// asks for them.
type Connections struct {
	mu      sync.Mutex
	awaited map[connection]chan net.Conn
}

// connection is the name of one, and which node opened it: its name is of no use
// to another.
type connection struct {
	opener string // topology segment
	name   [nameSize]byte
}

// NewConnections makes room for them.
func NewConnections() *Connections { return &Connections{awaited: map[connection]chan net.Conn{}} }

// Add takes a connection that a node has opened, by its topology segment, and
// reads its name. It closes one that no call asks for.
func (c *Connections) Add(opener string, opened net.Conn) error {
	of := connection{opener: opener}
	if _, err := io.ReadFull(opened, of.name[:]); err != nil {
		return errors.Join(fmt.Errorf("reading the name of a connection for bytes: %w", err), opened.Close())
	}
	place := c.place(of)
	select {
	case place <- opened:
	default:
		return errors.Join(errors.New("two connections for bytes have one name"), opened.Close())
	}
	time.AfterFunc(patience, func() {
		select {
		case left := <-place:
			c.forget(of)
			left.Close()
		default:
		}
	})
	return nil
}

// take waits for the connection of that name.
func (c *Connections) take(ctx context.Context, opener string, name []byte) (net.Conn, error) {
	if len(name) != nameSize {
		return nil, pool.Errorf(pool.ErrInvalid, "the name of a connection has %d bytes; it must have %d", len(name), nameSize)
	}
	of := connection{opener, [nameSize]byte(name)}
	place := c.place(of)
	defer c.forget(of)
	select {
	case opened := <-place:
		return opened, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(patience):
		return nil, pool.Errorf(pool.ErrUnavailable, "the connection for the bytes has not come in %s", patience)
	}
}

// place is where the connection and its call meet.
func (c *Connections) place(of connection) chan net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	place := c.awaited[of]
	if place == nil {
		place = make(chan net.Conn, 1)
		c.awaited[of] = place
	}
	return place
}

func (c *Connections) forget(of connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.awaited, of)
}
