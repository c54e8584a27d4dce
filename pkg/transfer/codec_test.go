package transfer

import (
	"bytes"
	"crypto/rand"
	"math"
	"testing"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

func responses() map[string]*peerapi.ReadResponse {
	piece := func(offset int64, n int) *peerapi.ReadResponse {
		data := make([]byte, n)
		_, _ = rand.Read(data)
		return &peerapi.ReadResponse{Part: &peerapi.ReadResponse_Piece{Piece: &peerapi.Piece{Offset: offset, Data: data, Checksum: 0xfedcba98}}}
	}
	return map[string]*peerapi.ReadResponse{
		"a description":         {Part: &peerapi.ReadResponse_Description{Description: &peerapi.Description{Size: 1 << 40, Content: "ext4", Created: 17}}},
		"nothing":               {},
		"a whole piece":         piece(1<<40, pool.PieceSize),
		"a block":               piece(4096, 4096),
		"at the beginning":      piece(0, 4096),
		"a few bytes":           piece(1<<20, 3),
		"at the last offset":    piece(math.MaxInt64, 1),
		"a negative offset":     piece(-1, 100),
		"no bytes":              piece(8192, 0),
		"more than is accepted": piece(0, 2*pool.PieceSize),
	}
}

// cut gives a message in parts, as it comes from the network.
func cut(b []byte, size int) mem.BufferSlice {
	var parts mem.BufferSlice
	for ; len(b) > size; b = b[size:] {
		parts = append(parts, mem.SliceBuffer(b[:size]))
	}
	return append(parts, mem.SliceBuffer(b))
}

// What the codec writes, the protobuf library reads, and the other way round:
// they are the same messages.
func TestCodecIsProtobuf(t *testing.T) {
	ours, library := encoding.GetCodecV2(codecName), encoding.GetCodecV2(grpcproto.Name)
	for what, want := range responses() {
		t.Run(what, func(t *testing.T) {
			for by, writer := range map[string]encoding.CodecV2{"the codec": ours, "the library": library} {
				written, err := writer.Marshal(want)
				if err != nil {
					t.Fatal(err)
				}
				b := written.Materialize()
				written.Free()
				for _, size := range []int{7, 1000, 16384, max(len(b), 1)} {
					for of, reader := range map[string]encoding.CodecV2{"the codec": ours, "the library": library} {
						var got peerapi.ReadResponse
						if err := reader.Unmarshal(cut(b, size), &got); err != nil {
							t.Fatalf("%s reads what %s wrote, in parts of %d bytes: %v", of, by, size, err)
						}
						if !proto.Equal(&got, want) {
							t.Fatalf("%s does not read what %s wrote, in parts of %d bytes", of, by, size)
						}
					}
				}
			}
		})
	}
}

// One message is read after the other into the same memory, which is what the
// codec is for.
func TestCodecUsesMemoryAgain(t *testing.T) {
	c := encoding.GetCodecV2(codecName)
	all := responses()
	var got peerapi.ReadResponse
	var memory *byte
	for _, what := range []string{"a whole piece", "a few bytes", "a block", "a whole piece"} {
		b, err := c.Marshal(all[what])
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(&got, all[what]) {
			t.Fatalf("%s is read wrong into memory that is used again", what)
		}
		if at := &got.GetPiece().GetData()[0]; memory != nil && at != memory {
			t.Errorf("%s is in new memory", what)
		} else {
			memory = at
		}
		b.Free()
	}
}

// No message that anybody sends does more than fail: what is read of it is what
// the library reads.
func FuzzCodec(f *testing.F) {
	ours, library := encoding.GetCodecV2(codecName), encoding.GetCodecV2(grpcproto.Name)
	for _, r := range responses() {
		b, err := ours.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b.Materialize()[:min(b.Len(), 150)])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var got, want peerapi.ReadResponse
		err := ours.Unmarshal(cut(bytes.Clone(b), 1000), &got)
		wanted := library.Unmarshal(cut(b, 1000), &want)
		if (err == nil) != (wanted == nil) || err == nil && !proto.Equal(&got, &want) {
			t.Errorf("the codec reads %v (%v), the library %v (%v)", &got, err, &want, wanted)
		}
	})
}
