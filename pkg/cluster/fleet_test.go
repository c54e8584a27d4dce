package cluster

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/orlop-csi/orlop/pkg/request"
	"github.com/orlop-csi/orlop/pkg/router"
)

func node(name string, labels ...string) *core.Node {
	n := &core.Node{ObjectMeta: meta.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/os": "linux"}}}
	for _, l := range labels {
		n.Labels[l] = name
	}
	return n
}

func TestWhoIsInTheFleet(t *testing.T) {
	const had = request.TopologyKey
	long := strings.Repeat("long-name.", 8) + "example"
	for name, test := range map[string]struct {
		nodes      []*core.Node
		registered []string
		addresses  map[string]string
		want       []router.Node
	}{
		"a node that never had the driver is not waited for": {
			nodes: []*core.Node{node("gpu-1")},
		},
		"a node whose driver serves": {
			nodes:      []*core.Node{node("node-1", had)},
			registered: []string{"node-1"},
			addresses:  map[string]string{"node-1": "192.0.2.1:9810"},
			want:       []router.Node{{Segment: "node-1", Address: "192.0.2.1:9810"}},
		},
		"a node whose driver serves before the kubelet knows": {
			nodes:     []*core.Node{node("node-1")},
			addresses: map[string]string{"node-1": "192.0.2.1:9810"},
			want:      []router.Node{{Segment: "node-1", Address: "192.0.2.1:9810"}},
		},
		"a node that the kubelet knows, and does not serve yet": {
			nodes:      []*core.Node{node("node-1")},
			registered: []string{"node-1"},
			want:       []router.Node{{Segment: "node-1"}},
		},
		"a node that had the driver may hold volumes": {
			nodes: []*core.Node{node("node-1", had)},
			want:  []router.Node{{Segment: "node-1"}},
		},
		"a node that is deleted is gone, whatever is left of it": {
			registered: []string{"node-1"},
			addresses:  map[string]string{"node-1": "192.0.2.1:9810"},
		},
		"a node that claims to be another": {
			nodes: []*core.Node{{ObjectMeta: meta.ObjectMeta{Name: "node-2", Labels: map[string]string{had: "node-1"}}}},
			want:  []router.Node{{Segment: "node-2"}},
		},
		"a node with a long name": {
			nodes: []*core.Node{node(long, had)},
			want:  []router.Node{{Segment: "long-name.long-name.long-name.long-name-5b162fbb"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := members(test.nodes, func(n string) bool { return slices.Contains(test.registered, n) }, test.addresses)
			if err != nil || !slices.Equal(got, test.want) {
				t.Errorf("%v, %v; want %v", got, err, test.want)
			}
		})
	}
	if _, err := members([]*core.Node{node("node-1", had), node("node-1", had)}, nil, nil); err == nil {
		t.Error("two nodes of one name are no error")
	}
}

func TestWhereTheDriversServe(t *testing.T) {
	at := func(kind discovery.AddressType, name string, port int32, endpoints ...discovery.Endpoint) *discovery.EndpointSlice {
		metrics, peer := "metrics", PeerPort
		other := int32(1)
		return &discovery.EndpointSlice{
			ObjectMeta:  meta.ObjectMeta{Name: name},
			AddressType: kind,
			Ports:       []discovery.EndpointPort{{Name: &metrics, Port: &other}, {Name: &peer, Port: &port}},
			Endpoints:   endpoints,
		}
	}
	endpoint := func(node string, ready bool, addresses ...string) discovery.Endpoint {
		return discovery.Endpoint{NodeName: &node, Addresses: addresses, Conditions: discovery.EndpointConditions{Ready: &ready}}
	}
	unknown := endpoint("node-4", true, "192.0.2.4")
	unknown.Conditions.Ready = nil
	nowhere := endpoint("", true, "192.0.2.5")
	nowhere.NodeName = nil
	all := []*discovery.EndpointSlice{
		at(discovery.AddressTypeIPv6, "a", 9810, endpoint("node-1", true, "2001:db8::1"), endpoint("node-6", true, "2001:db8::6")),
		at(discovery.AddressTypeIPv4, "c", 9810, endpoint("node-1", true, "192.0.2.11"), endpoint("node-2", false, "192.0.2.2")),
		at(discovery.AddressTypeIPv4, "b", 9810, endpoint("node-1", true, "192.0.2.1"), endpoint("node-3", true), unknown, nowhere),
		at(discovery.AddressTypeFQDN, "d", 9810, endpoint("node-7", true, "node-7.example")),
		{ObjectMeta: meta.ObjectMeta{Name: "e"}, AddressType: discovery.AddressTypeIPv4, Endpoints: []discovery.Endpoint{endpoint("node-8", true, "192.0.2.8")}},
	}
	want := map[string]string{"node-1": "192.0.2.1:9810", "node-4": "192.0.2.4:9810", "node-6": "[2001:db8::6]:9810"}
	for range 3 { // whatever order they come in
		if got := addresses(slices.Clone(all)); !maps.Equal(got, want) {
			t.Errorf("%v; want %v", got, want)
		}
		all = append(all[1:], all[0])
	}
}

func TestWhichSnapshotsTheClusterNames(t *testing.T) {
	for name, test := range map[string]struct {
		object string
		want   []string
	}{
		"taken":          {`{"spec":{"driver":"csi.orlop.dev","source":{"volumeHandle":"v"}},"status":{"snapshotHandle":"s"}}`, []string{"s"}},
		"being taken":    {`{"spec":{"source":{"volumeHandle":"v"}}}`, nil},
		"brought along":  {`{"spec":{"source":{"snapshotHandle":"s"}}}`, []string{"s"}},
		"a group":        {`{"status":{"volumeGroupSnapshotHandle":"g","volumeSnapshotInfoList":[{"volumeHandle":"v","snapshotHandle":"s1"},{"snapshotHandle":"s2"}]}}`, []string{"s1", "s2"}},
		"an older group": {`{"status":{"volumeSnapshotHandlePairList":[{"volumeHandle":"v","snapshotHandle":"s1"}]}}`, []string{"s1"}},
		"a group brought along": {
			`{"spec":{"source":{"groupSnapshotHandles":{"volumeGroupSnapshotHandle":"g","volumeSnapshotHandles":["s1","s2"]}}}}`, []string{"s1", "s2"},
		},
	} {
		var c content
		if err := json.Unmarshal([]byte(test.object), &c); err != nil {
			t.Fatal(err)
		}
		got := slices.DeleteFunc(c.handles(), func(h string) bool { return h == "" })
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: %v; want %v", name, got, test.want)
		}
	}
}
