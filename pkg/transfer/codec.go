package transfer

import (
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// codec is the protobuf codec, but for the one message that carries the bytes of
// a copy, a peerapi.ReadResponse with a piece: what the library does with each
// (clear memory for it, copy it, collect it) costs more than to encrypt it. Here
// they are written from and read into memory that is used again. On the wire it is
// the same message.
type codec struct{ encoding.CodecV2 }

// codecName is the content-subtype by which a caller asks for it.
const codecName = "orlop-copy"

func init() { //nolint:gochecknoinits // gRPC's registry is to be filled before all else
	encoding.RegisterCodecV2(codec{encoding.GetCodecV2(proto.Name)})
}

// Name implements encoding.CodecV2.
func (codec) Name() string { return codecName }

// The fields of the messages, as they are in copies.proto. head is more than all
// of them take before the data.
const (
	fieldPiece    = protowire.Number(2) // in ReadResponse
	fieldOffset   = protowire.Number(1) // in Piece
	fieldData     = protowire.Number(2)
	fieldChecksum = protowire.Number(3)

	head = 64 // bytes
)

// Marshal implements encoding.CodecV2. The data comes last, and is copied: its
// memory is the caller's again when it returns.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	r, _ := v.(*peerapi.ReadResponse)
	piece := r.GetPiece()
	if piece == nil {
		return c.CodecV2.Marshal(v)
	}
	offset, data := uint64(piece.GetOffset()), piece.GetData()
	size := protowire.SizeTag(fieldOffset) + protowire.SizeVarint(offset) +
		protowire.SizeTag(fieldChecksum) + protowire.SizeFixed32() +
		protowire.SizeTag(fieldData) + protowire.SizeBytes(len(data))
	buffer := messages.Get(protowire.SizeTag(fieldPiece) + protowire.SizeBytes(size))
	b := protowire.AppendTag((*buffer)[:0], fieldPiece, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = protowire.AppendTag(b, fieldOffset, protowire.VarintType)
	b = protowire.AppendVarint(b, offset)
	b = protowire.AppendTag(b, fieldChecksum, protowire.Fixed32Type)
	b = protowire.AppendFixed32(b, piece.GetChecksum())
	b = protowire.AppendTag(b, fieldData, protowire.BytesType)
	*buffer = protowire.AppendBytes(b, data)
	return mem.BufferSlice{mem.NewBuffer(buffer, messages)}, nil
}

// Unmarshal implements encoding.CodecV2. If v has a piece, the memory of its data
// is used again. What is not written as Marshal writes it is left to the library.
func (c codec) Unmarshal(message mem.BufferSlice, v any) error {
	r, ok := v.(*peerapi.ReadResponse)
	if !ok {
		return c.CodecV2.Unmarshal(message, v)
	}
	from := message.Reader()
	defer from.Close()
	first := make([]byte, min(head, message.Len()))
	if _, err := io.ReadFull(from, first); err != nil {
		return fmt.Errorf("reading a message: %w", err)
	}
	piece, length := parsePiece(first)
	if piece == nil || len(piece.GetData())+message.Len()-len(first) != length {
		return c.CodecV2.Unmarshal(message, v)
	}
	begun, data := piece.GetData(), r.GetPiece().GetData()
	if cap(data) < length {
		data = make([]byte, pool.PieceSize)
	}
	data = data[:length]
	if _, err := io.ReadFull(from, data[copy(data, begun):]); err != nil {
		return fmt.Errorf("reading a message: %w", err)
	}
	piece.Data = data
	r.Part = &peerapi.ReadResponse_Piece{Piece: piece}
	return nil
}

// parsePiece reads the first bytes of a message, with the data that is among
// them, and tells how long all the data is. It gives nil for what Marshal does not
// write.
func parsePiece(b []byte) (piece *peerapi.Piece, length int) {
	ok := true
	skip := func(n int) {
		ok = ok && n >= 0
		b = b[max(n, 0):]
	}
	tag := func(number protowire.Number, kind protowire.Type) {
		n, k, size := protowire.ConsumeTag(b)
		skip(size)
		ok = ok && n == number && k == kind
	}
	varint := func() uint64 {
		v, size := protowire.ConsumeVarint(b)
		skip(size)
		return v
	}
	tag(fieldPiece, protowire.BytesType)
	inner := varint()
	left := len(b)
	tag(fieldOffset, protowire.VarintType)
	offset := varint()
	tag(fieldChecksum, protowire.Fixed32Type)
	checksum, size := protowire.ConsumeFixed32(b)
	skip(size)
	tag(fieldData, protowire.BytesType)
	all := varint()
	if !ok || all > pool.PieceSize || uint64(left-len(b))+all != inner || len(b) > int(all) {
		return nil, 0
	}
	return &peerapi.Piece{Offset: int64(offset), Checksum: checksum, Data: b}, int(all)
}

// messages has the memory of messages on their way out. Other than the library's
// pools, it does not clear what will be overwritten.
var messages = &memory{}

type memory struct{ pool sync.Pool }

// Get implements mem.BufferPool.
func (m *memory) Get(length int) *[]byte {
	if b, ok := m.pool.Get().(*[]byte); ok && cap(*b) >= length {
		*b = (*b)[:length]
		return b
	}
	b := make([]byte, length, max(length, pool.PieceSize+head))
	return &b
}

// Put implements mem.BufferPool.
func (m *memory) Put(b *[]byte) { m.pool.Put(b) }
