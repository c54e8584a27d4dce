package transfer

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/orlop-csi/orlop/pkg/peerapi"
	"github.com/orlop-csi/orlop/pkg/pool"
)

// giver is a node with one snapshot, which gives it as each test says.
type giver struct {
	peerapi.UnimplementedCopiesServer

	connections *Connections
	snapshot    []byte

	mu    sync.Mutex
	calls []reply
	begun []int64 // with which block each call began that asked for bytes
}

// reply is what one call does with the connection.
type reply func(g *giver, from int64, to net.Conn) error

const blockOfTest = 64 << 10

func (g *giver) Read(r *peerapi.ReadRequest, out grpc.ServerStreamingServer[peerapi.Description]) error {
	if err := out.Send(&peerapi.Description{Size: int64(len(g.snapshot)), Content: "raw", Created: 7}); err != nil || r.GetConnection() == nil {
		return err
	}
	to, err := g.connections.take(out.Context(), "node-2", r.GetConnection())
	if err != nil {
		return err
	}
	defer to.Close()
	g.mu.Lock()
	do := g.calls[min(len(g.begun), len(g.calls)-1)]
	g.begun = append(g.begun, r.GetOffset()/blockOfTest)
	g.mu.Unlock()
	return do(g, r.GetOffset(), to)
}

// give gives some blocks.
func (g *giver) give(from, end int64, to net.Conn) (int64, error) {
	for ; from < end; from += blockOfTest {
		if err := writePiece(to, pool.Piece{Offset: from, Data: g.snapshot[from:][:blockOfTest]}); err != nil {
			return from, err
		}
	}
	return from, nil
}

// What the calls of the tests do.
var (
	whole reply = func(g *giver, from int64, to net.Conn) error {
		if _, err := g.give(from, int64(len(g.snapshot)), to); err != nil {
			return err
		}
		if err := writePiece(to, pool.Piece{}); err != nil {
			return err
		}
		_, _ = to.Read(make([]byte, 1))
		return nil
	}
	// partThen gives two blocks, and does something else.
	partThen = func(do reply) reply {
		return func(g *giver, from int64, to net.Conn) error {
			from, err := g.give(from, from+2*blockOfTest, to)
			if err != nil {
				return err
			}
			return do(g, from, to)
		}
	}
	breaks reply = func(_ *giver, _ int64, to net.Conn) error {
		return errors.Join(to.Close(), status.Error(codes.Unavailable, "the node ends"))
	}
	breaksInAPiece reply = func(g *giver, from int64, to net.Conn) error {
		var b bytes.Buffer
		_ = writePiece(&b, pool.Piece{Offset: from, Data: g.snapshot[from:][:blockOfTest]})
		_, _ = to.Write(b.Bytes()[:b.Len()-5])
		return errors.Join(to.Close(), status.Error(codes.Unavailable, "the node ends"))
	}
	corrupts reply = func(g *giver, from int64, to net.Conn) error {
		var b bytes.Buffer
		_ = writePiece(&b, pool.Piece{Offset: from, Data: g.snapshot[from:][:blockOfTest]})
		b.Bytes()[b.Len()-5] ^= 1
		_, _ = to.Write(b.Bytes())
		_, _ = to.Read(make([]byte, 1))
		return nil
	}
	refuses = func(code codes.Code) reply {
		return func(*giver, int64, net.Conn) error { return status.Error(code, "no") }
	}
	// endsWell tells of an end that is none.
	endsWell     reply = func(*giver, int64, net.Conn) error { return nil }
	endsThenFail reply = func(_ *giver, _ int64, to net.Conn) error {
		_ = writePiece(to, pool.Piece{})
		_, _ = to.Read(make([]byte, 1))
		return status.Error(codes.DataLoss, "the disk could not be read")
	}
)

// copied begins a copy of what the giver has, and gives what arrives.
func copied(t *testing.T, calls ...reply) (got []byte, g *giver, err error) {
	t.Helper()
	g = &giver{connections: NewConnections(), calls: calls}
	g.snapshot = pieceOf(0, 16*blockOfTest).Data
	forCalls, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	peerapi.RegisterCopiesServer(server, g)
	go func() { _ = server.Serve(forCalls) }()
	t.Cleanup(server.Stop)
	forBytes, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = forBytes.Close() })
	go func() {
		for {
			c, err := forBytes.Accept()
			if err != nil {
				return
			}
			go func() { _ = g.connections.Add("node-2", c) }()
		}
	}()
	copies := New(Options{
		Dial: func(_, address string) (*grpc.ClientConn, error) {
			return grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		},
		Open: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", forBytes.Addr().String())
		},
	})
	order := func() *peerapi.CopyOrder {
		return &peerapi.CopyOrder{Node: "node-1", Address: forCalls.Addr().String(), SnapshotId: "s"}
	}
	ctx, one, end := copies.Begin(t.Context(), "volume", "node-1", order())
	defer func() { end(err) }()
	var asking sync.WaitGroup
	defer asking.Wait()
	over, stop := context.WithCancel(t.Context())
	defer stop()
	asking.Go(func() { // the orchestrator repeats its call, each time with a new ticket
		for over.Err() == nil {
			if err := copies.Ask("volume", order()); !errors.Is(err, pool.ErrBusy) {
				t.Errorf("asked for a volume on its way: %v", err)
			}
		}
	})
	remote, done, err := one.Remote(ctx)
	if err != nil {
		return nil, g, err
	}
	defer done()
	got = make([]byte, remote.Size)
	for piece, err := range remote.Read(ctx, 0) {
		if err != nil {
			return nil, g, err
		}
		copy(got[piece.Offset:], piece.Data)
	}
	return got, g, nil
}

// A copy has everything, each byte once, however it was broken off.
func TestACopyGoesOnWhereItWasBrokenOff(t *testing.T) {
	type replies = []reply
	for what, test := range map[string]struct {
		calls replies
		from  []int64 // in blocks
	}{
		"nothing happens":                       {replies{whole}, []int64{0}},
		"the connection breaks between pieces":  {replies{partThen(breaks), whole}, []int64{0, 2}},
		"the connection breaks within a piece":  {replies{partThen(breaksInAPiece), whole}, []int64{0, 2}},
		"it breaks again and again":             {replies{partThen(breaks), breaks, partThen(breaksInAPiece), whole}, []int64{0, 2, 2, 4}},
		"a piece is corrupt":                    {replies{partThen(corrupts), whole}, []int64{0, 2}},
		"pieces are corrupt now and then":       {replies{partThen(corrupts), corrupts, partThen(corrupts), partThen(corrupts), whole}, []int64{0, 2, 2, 4, 6}},
		"the call ends well before the bytes":   {replies{partThen(endsWell), whole}, []int64{0, 2}},
		"the snapshot is busy when it is begun": {replies{refuses(codes.Aborted), whole}, []int64{0, 0}},
	} {
		t.Run(what, func(t *testing.T) {
			got, g, err := copied(t, test.calls...)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, g.snapshot) {
				t.Error("the copy is not what the snapshot is")
			}
			if !slices.Equal(g.begun, test.from) {
				t.Errorf("the calls began with the blocks %d, want %d", g.begun, test.from)
			}
		})
	}
}

// What cannot pass by itself ends the copy, with its reason.
func TestACopyThatCannotGoOnTellsWhy(t *testing.T) {
	for what, test := range map[string]struct {
		calls []reply
		code  codes.Code
		kind  error
	}{
		"the snapshot is gone":                    {calls: []reply{partThen(refuses(codes.NotFound))}, code: codes.NotFound},
		"the ticket is not good":                  {calls: []reply{refuses(codes.PermissionDenied)}, code: codes.PermissionDenied},
		"the end comes, and then it was not well": {calls: []reply{partThen(endsThenFail)}, code: codes.DataLoss},
		"it is corrupt each time":                 {calls: []reply{corrupts}, kind: pool.ErrDamaged},
	} {
		t.Run(what, func(t *testing.T) {
			begin := time.Now()
			_, _, err := copied(t, test.calls...)
			if test.kind != nil && !errors.Is(err, test.kind) || test.kind == nil && status.Code(err) != test.code {
				t.Errorf("%v, want %v %v", err, test.code, test.kind)
			}
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}
