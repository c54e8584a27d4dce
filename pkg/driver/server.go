package driver

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"
)

// part is a part of the process. It works until its context is done, then ends
// in good order and in bounded time.
type part func(ctx context.Context) error

// run runs the parts until ctx is done or one of them ends by itself. Then it
// ends them one after the other, the last one first.
func run(ctx context.Context, parts ...part) error {
	type running struct {
		stop  context.CancelFunc
		ended chan error
	}
	var all []running
	oneEnded := make(chan struct{}, len(parts))
	for _, p := range parts {
		// A part must not see the others' end before its turn.
		partCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		r := running{stop, make(chan error, 1)}
		go func() {
			r.ended <- p(partCtx)
			oneEnded <- struct{}{}
		}()
		all = append(all, r)
	}
	select {
	case <-ctx.Done():
	case <-oneEnded:
	}
	var errs []error
	for _, r := range slices.Backward(all) {
		r.stop()
		errs = append(errs, <-r.ended)
	}
	return errors.Join(errs...)
}

const (
	// handshake bounds how long a client may take from connecting to talking
	// HTTP/2; the server cannot stop while it waits for one.
	handshake = 10 * time.Second
	// cutOff is how long calls that are cut off have for noticing.
	cutOff = 2 * time.Second
)

// calls serves gRPC calls.
type calls struct {
	server   *grpc.Server
	edge     *edge
	listener net.Listener
	ready    *readiness
	// drain is how long calls in flight may take at the end.
	drain time.Duration
}

// newCalls makes a server whose every call passes the edge. Services can be
// registered with it until it serves.
func newCalls(listener net.Listener, metrics *callMetrics, ready *readiness, drain time.Duration, more ...grpc.ServerOption) *calls {
	e := &edge{metrics: metrics}
	return &calls{
		server: grpc.NewServer(append(more,
			grpc.UnaryInterceptor(e.unary),
			grpc.StreamInterceptor(e.stream),
			grpc.ConnectionTimeout(handshake),
		)...),
		edge:     e,
		listener: listener,
		ready:    ready,
		drain:    drain,
	}
}

// serve is a [part]. At the end it takes no new calls and lets those in flight
// finish. What has not finished in time is cut off, which is an error; every
// operation can be repeated after that.
func (c *calls) serve(ctx context.Context) error {
	c.ready.set("") // before the first call, which may ask for it
	ended := make(chan error, 1)
	go func() { ended <- c.server.Serve(c.listener) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serving calls: %w", err)
	case <-ctx.Done():
	}
	c.ready.set("shutting down")
	klog.InfoS("Shutting down", "callsInFlight", c.edge.inFlight.Load(), "timeout", c.drain.String())

	drained := make(chan struct{})
	go func() {
		c.server.GracefulStop()
		close(drained)
	}()
	select {
	case <-drained:
		return nil
	case <-time.After(c.drain):
	}
	cut := c.edge.inFlight.Load()
	go c.server.Stop() // ends the contexts of the calls
	select {
	case <-drained:
	case <-time.After(cutOff):
	}
	if cut == 0 { // only a client that keeps its connection
		return nil
	}
	return fmt.Errorf("%d calls had not ended after %s and were cut off", cut, c.drain)
}

// health is what the process tells of itself to those who run it.
type health struct {
	ready *readiness
	// broken tells what a restart may mend.
	broken []func() error
	// awaited tells what the driver can do without for a while, but does not
	// do all its work without.
	awaited []func() error
}

// reason tells why the process is not healthy, or, of those that are awaited,
// not ready; none is that it is.
func (h *health) reason(awaited bool) string {
	if reason := h.ready.reason(); reason != "" {
		return reason
	}
	checks := h.broken
	if awaited {
		checks = slices.Concat(h.broken, h.awaited)
	}
	for _, check := range checks {
		if err := check(); err != nil {
			return err.Error()
		}
	}
	return ""
}

// web serves metrics and health over HTTP.
type web struct {
	listener net.Listener
	metrics  *prometheus.Registry
	health   *health
}

// The bounds of an HTTP request and of its handler.
const (
	webTimeout    = 10 * time.Second
	maxWebScrapes = 4
)

func (w *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(w.metrics, promhttp.HandlerOpts{
		ErrorLog:            klogLines("metrics"),
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxWebScrapes,
		Timeout:             webTimeout,
	}))
	for path, awaited := range map[string]bool{"GET /healthz": false, "GET /readyz": true} {
		mux.HandleFunc(path, func(out http.ResponseWriter, _ *http.Request) {
			if reason := w.health.reason(awaited); reason != "" {
				http.Error(out, reason, http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(out, "ok")
		})
	}
	return mux
}

// serve is a [part].
func (w *web) serve(ctx context.Context) error {
	server := &http.Server{
		Handler:           w.handler(),
		ReadHeaderTimeout: webTimeout,
		ReadTimeout:       webTimeout,
		IdleTimeout:       time.Minute,
		ErrorLog:          klogLines("http"),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(w.listener) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serving metrics: %w", err)
	case <-ctx.Done():
		// Nobody loses anything by a scrape that is cut off.
		return server.Close()
	}
}

// klogLines gives the standard library's kind of logger, writing to the log.
func klogLines(component string) *log.Logger {
	return log.New(klogWriter(component), "", 0)
}

type klogWriter string

func (w klogWriter) Write(line []byte) (int, error) {
	klog.InfoS("Message", "component", string(w), "text", strings.TrimSpace(string(line)))
	return len(line), nil
}
