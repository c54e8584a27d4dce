package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// blocking is a CreateVolume that tells that it began and ends when it is let.
type blocking struct {
	began chan struct{}
	end   chan struct{}
	// deaf makes it miss that its caller has gone.
	deaf bool
}

func newBlocking() *blocking {
	return &blocking{began: make(chan struct{}), end: make(chan struct{})}
}

func (b *blocking) create(ctx context.Context, _ *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	close(b.began)
	gone := ctx.Done()
	if b.deaf {
		gone = nil
	}
	select {
	case <-b.end:
		return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: "done"}}, nil
	case <-gone:
		return nil, ctx.Err()
	}
}

// call starts a call and gives its error when it has ended.
func (s *served) call(t *testing.T) chan error {
	t.Helper()
	result := make(chan error, 1)
	go func() {
		r, err := s.client.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "slow"})
		if err == nil && r.GetVolume().GetVolumeId() != "done" {
			err = fmt.Errorf("got %v", r)
		}
		result <- err
	}()
	return result
}

func within[T any](t *testing.T, limit time.Duration, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatalf("nothing after %s", limit)
		panic("unreachable")
	}
}

func TestAtTheEndCallsInFlightFinishAndNewOnesAreRefused(t *testing.T) {
	captureLog(t, "text", 0)
	b := newBlocking()
	s := serve(t, &fakeServices{create: b.create}, time.Minute)
	slow := s.call(t)
	within(t, 10*time.Second, b.began)
	s.stop()

	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(s.path); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the socket is still there")
		}
	}
	if got := s.calls.ready.reason(); got != "shutting down" {
		t.Errorf("readiness is %q", got)
	}
	if c, err := net.Dial("unix", s.path); err == nil {
		c.Close()
		t.Error("a new client can connect")
	}
	select {
	case err := <-slow:
		t.Fatalf("the call ended before its time: %v", err)
	case err := <-s.ended:
		t.Fatalf("the server ended before its call: %v", err)
	default:
	}
	close(b.end)
	if err := within(t, 10*time.Second, slow); err != nil {
		t.Errorf("the call in flight failed: %v", err)
	}
	if err := within(t, 10*time.Second, s.ended); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

func TestACallThatOutlastsTheTimeoutIsCutOff(t *testing.T) {
	for name, deaf := range map[string]bool{"and told": false, "also if it does not listen": true} {
		t.Run(name, func(t *testing.T) {
			captureLog(t, "text", 0)
			b := newBlocking()
			b.deaf = deaf
			defer close(b.end)
			s := serve(t, &fakeServices{create: b.create}, 50*time.Millisecond)
			slow := s.call(t)
			within(t, 10*time.Second, b.began)
			s.stop()
			err := within(t, 10*time.Second, s.ended)
			if want := "1 calls had not ended after 50ms and were cut off"; err == nil || err.Error() != want {
				t.Errorf("the server ended with %v, want %s", err, want)
			}
			if err := within(t, 10*time.Second, slow); status.Code(err) != codes.Unavailable {
				t.Errorf("the call ended with %v", err)
			}
		})
	}
}

func TestAClientThatSaysNothingDoesNotHoldTheEndUp(t *testing.T) {
	captureLog(t, "text", 0)
	s := serve(t, &fakeServices{}, 50*time.Millisecond)
	silent, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := s.client.GetCapacity(t.Context(), &csi.GetCapacityRequest{}); err != nil { // it has been accepted by now
		t.Fatal(err)
	}
	s.stop()
	if err := within(t, 5*time.Second, s.ended); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

func TestPartsEndOneAfterTheOtherTheLastFirst(t *testing.T) {
	var order []string
	worker := func(name string, err error) part {
		return func(ctx context.Context) error {
			<-ctx.Done()
			order = append(order, name)
			return err
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	bad := errors.New("bad end")
	if err := run(ctx, worker("a", nil), worker("b", bad), worker("c", nil)); !errors.Is(err, bad) {
		t.Errorf("got %v", err)
	}
	if want := []string{"c", "b", "a"}; !slices.Equal(order, want) {
		t.Errorf("ended in the order %v, want %v", order, want)
	}
}

func TestAPartThatFailsEndsTheOthers(t *testing.T) {
	failure := errors.New("failed")
	ended := false
	err := run(t.Context(),
		func(ctx context.Context) error { <-ctx.Done(); ended = true; return nil },
		func(context.Context) error { return failure })
	if !errors.Is(err, failure) || !ended {
		t.Errorf("got %v, the other ended: %v", err, ended)
	}
}

func TestHealthzSaysWhyNot(t *testing.T) {
	ready := &readiness{}
	registry, _ := newRegistry("v1.2.3")
	server := httptest.NewServer((&web{metrics: registry, health: &health{ready: ready}}).handler())
	defer server.Close()
	get := func(path string) (int, string) {
		t.Helper()
		r, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, strings.TrimSpace(string(body))
	}
	for _, reason := range []string{"starting", "opening pools", "", "shutting down"} {
		wantCode, wantBody := http.StatusServiceUnavailable, reason
		if reason == "" {
			wantCode, wantBody = http.StatusOK, "ok"
		}
		if reason != "starting" {
			ready.set(reason)
		}
		if code, body := get("/healthz"); code != wantCode || body != wantBody {
			t.Errorf("%q: got %d %q", reason, code, body)
		}
	}
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, `version="v1.2.3"`) {
		t.Errorf("metrics: got %d %q", code, body)
	}
	if code, _ := get("/"); code != http.StatusNotFound {
		t.Errorf("the root gives %d", code)
	}
}

func TestTheWebServerEndsWithItsContext(t *testing.T) {
	registry, _ := newRegistry("v1.2.3")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- (&web{listener: l, metrics: registry, health: &health{ready: &readiness{}}}).serve(ctx)
	}()
	r, err := http.Get("http://" + l.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("got %s before anything serves", r.Status)
	}
	stop()
	if err := within(t, 10*time.Second, ended); err != nil {
		t.Errorf("ended with %v", err)
	}
}
