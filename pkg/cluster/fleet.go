package cluster

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/orlop-csi/orlop/pkg/pool"
	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/router"
)

// PeerPort is the name of the port, in the Service of the nodes, at which the
// router calls them.
const PeerPort = "peer"

// Fleet is the nodes of the cluster that have the driver, from a copy of the
// API server's objects that is kept up to date. It is a [router.Discovery].
type Fleet struct {
	client                 *Client
	driver                 string // its name
	nodes, drivers, slices cache.SharedIndexInformer
}

// Fleet prepares the discovery of the nodes whose drivers are the endpoints of
// that headless Service. driver is the CSI driver's name.
func (c *Client) Fleet(driver, namespace, service string) (*Fleet, error) {
	f := &Fleet{client: c, driver: driver}
	var err error
	if f.nodes, err = informer(c.core, "nodes", "", &core.Node{}, func(n *core.Node) {
		n.Annotations, n.Status = nil, core.NodeStatus{} // large, and nothing of it is needed
	}, nil); err != nil {
		return nil, err
	}
	if f.drivers, err = informer(c.storage, "csinodes", "", &storage.CSINode{}, nil, nil); err != nil {
		return nil, err
	}
	f.slices, err = informer(c.discovery, "endpointslices", namespace, &discovery.EndpointSlice{}, nil, func(o *meta.ListOptions) {
		o.LabelSelector = discovery.LabelServiceName + "=" + service
	})
	return f, err
}

// Run keeps the copy up to date until ctx is done.
func (f *Fleet) Run(ctx context.Context) error {
	return run(ctx, func(ctx context.Context) error {
		<-ctx.Done()
		return nil
	}, f.informers()...)
}

func (f *Fleet) informers() []cache.SharedIndexInformer {
	return []cache.SharedIndexInformer{f.nodes, f.drivers, f.slices}
}

// Problem is that not all objects have been read yet; nil if they have.
func (f *Fleet) Problem() error {
	for _, i := range f.informers() {
		if !i.HasSynced() {
			return errNotYet
		}
	}
	return nil
}

// Nodes implements [router.Discovery]. A node of the cluster is one of the fleet
// if the driver serves there, or has ever done so: the kubelet then has put the
// topology's label on it, which stays when the driver goes away. So a node that
// never had the driver is not waited for, and one that may hold volumes is. The
// label's value is not looked at, because a node can set its own labels.
//
// While no pod of the driver is ready there, a node has no address. When its
// Node object is deleted, it is gone for good.
func (f *Fleet) Nodes(context.Context) ([]router.Node, error) {
	if err := f.Problem(); err != nil {
		return nil, err
	}
	var all []*core.Node
	for _, object := range f.nodes.GetStore().List() {
		if n, ok := object.(*core.Node); ok {
			all = append(all, n)
		}
	}
	return members(all, f.registered, f.addresses())
}

// members are those of a cluster's nodes that are in the fleet.
func members(nodes []*core.Node, registered func(node string) bool, addresses map[string]string) ([]router.Node, error) {
	var fleet []router.Node
	names := map[string]string{}
	for _, n := range nodes {
		_, labelled := n.Labels[request.TopologyKey]
		address, served := addresses[n.Name]
		if !labelled && !served && !registered(n.Name) {
			continue
		}
		segment, err := pool.NodeSegment(n.Name)
		if err != nil {
			return nil, err
		}
		if other, taken := names[segment]; taken {
			return nil, fmt.Errorf("nodes %s and %s cannot be told apart: both are %s", other, n.Name, segment)
		}
		names[segment] = n.Name
		fleet = append(fleet, router.Node{Segment: segment, Address: address})
	}
	return fleet, nil
}

// shortened is how the segment of a node with a long name ends; see
// pool.NodeSegment.
var shortened = regexp.MustCompile(`-[0-9a-f]{8}$`)

// Gone implements [router.Discovery]: it asks the API server, not the copy.
func (f *Fleet) Gone(ctx context.Context, segment string) (bool, error) {
	err := f.client.core.Get().Resource("nodes").Name(segment).Do(ctx).Error()
	if !apierrors.IsNotFound(err) {
		return false, err // it is there, or that is unknown
	}
	if !shortened.MatchString(segment) {
		return true, nil
	}
	gone := true
	err = each(ctx, f.client, "/api/v1/nodes", func(n partial) {
		if s, err := pool.NodeSegment(n.Metadata.Name); err == nil && s == segment {
			gone = false
		}
	})
	return gone, err
}

// partial is what is needed of an object to know its name.
type partial struct {
	Metadata struct {
		Name string `json:"name"`
	} `json:"metadata"`
}

// registered reports whether the kubelet of a node has the driver registered.
func (f *Fleet) registered(node string) bool {
	object, exists, err := f.drivers.GetStore().GetByKey(node)
	if err != nil || !exists {
		return false
	}
	c, ok := object.(*storage.CSINode)
	return ok && slices.ContainsFunc(c.Spec.Drivers, func(d storage.CSINodeDriver) bool { return d.Name == f.driver })
}

// addresses gives the nodes whose driver is ready, and where.
func (f *Fleet) addresses() map[string]string {
	var all []*discovery.EndpointSlice
	for _, object := range f.slices.GetStore().List() {
		if s, ok := object.(*discovery.EndpointSlice); ok {
			all = append(all, s)
		}
	}
	return addresses(all)
}

// addresses takes the ready endpoints with a node's name out of slices. Should a
// node have several, as with IPv4 and IPv6, it is always the same one that is
// taken, so that connections last.
func addresses(all []*discovery.EndpointSlice) map[string]string {
	slices.SortFunc(all, func(a, b *discovery.EndpointSlice) int {
		return cmp.Or(cmp.Compare(a.AddressType, b.AddressType), cmp.Compare(a.Name, b.Name))
	})
	found := map[string]string{}
	for _, s := range all {
		if s.AddressType != discovery.AddressTypeIPv4 && s.AddressType != discovery.AddressTypeIPv6 {
			continue
		}
		port := slices.IndexFunc(s.Ports, func(p discovery.EndpointPort) bool {
			return p.Name != nil && *p.Name == PeerPort && p.Port != nil
		})
		if port < 0 {
			continue
		}
		for _, e := range s.Endpoints {
			// No word on readiness means ready (EndpointConditions).
			if e.NodeName == nil || len(e.Addresses) == 0 || e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			if _, taken := found[*e.NodeName]; !taken {
				found[*e.NodeName] = net.JoinHostPort(e.Addresses[0], strconv.Itoa(int(*s.Ports[port].Port)))
			}
		}
	}
	return found
}
