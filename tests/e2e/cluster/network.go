package cluster

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// network is the /16 of a cluster. The control plane has a bridge, to which it,
// the nodes and this machine are attached; so only one link and one route of this
// machine are the cluster's, and both vanish with the control plane's namespace.
//
//	N.N.0.0/24         the bridge: .1 the API server, .11… the nodes, .254 this machine
//	N.N.64.0/18        Services
//	N.N.128.0/17       pods, a /24 for each node
type network struct {
	Prefix string `json:"prefix"` // "10.213"
}

func (n network) whole() string        { return n.Prefix + ".0.0/16" }
func (n network) api() string          { return n.Prefix + ".0.1" }
func (n network) host() string         { return n.Prefix + ".0.254" }
func (n network) node(i int) string    { return fmt.Sprintf("%s.0.%d", n.Prefix, 10+i) }
func (n network) services() string     { return n.Prefix + ".64.0/18" }
func (n network) firstService() string { return n.Prefix + ".64.1" }
func (n network) pods() string         { return n.Prefix + ".128.0/17" }
func (n network) podsOf(i int) string  { return fmt.Sprintf("%s.%d.0/24", n.Prefix, 128+i) }

// chooseNetwork picks private addresses that this machine has no route to.
func chooseNetwork() (network, error) {
	used, err := routes()
	if err != nil {
		return network{}, err
	}
candidates:
	for _, prefix := range []string{"10.213", "10.214", "10.87", "172.29", "198.18"} {
		n := network{Prefix: prefix}
		whole := netip.MustParsePrefix(n.whole())
		for _, route := range used {
			if route.Overlaps(whole) {
				continue candidates
			}
		}
		return n, nil
	}
	return network{}, errors.New("this machine has a route to each network that a cluster could use")
}

// routes gives the IPv4 routes of this machine but the default ones.
func routes() ([]netip.Prefix, error) {
	file, err := os.Open("/proc/net/route")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found []netip.Prefix
	scanner := bufio.NewScanner(file)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) < 8 || fields[0] == "Iface" {
			continue
		}
		destination, err := strconv.ParseUint(fields[1], 16, 32)
		mask, err2 := strconv.ParseUint(fields[7], 16, 32)
		if err := errors.Join(err, err2); err != nil {
			return nil, fmt.Errorf("read /proc/net/route: %w", err)
		}
		if mask == 0 {
			continue
		}
		// A number in the machine's byte order that is an address in memory.
		address := [4]byte(binary.NativeEndian.AppendUint32(nil, uint32(destination)))
		found = append(found, netip.PrefixFrom(netip.AddrFrom4(address), bits.OnesCount32(uint32(mask))))
	}
	return found, scanner.Err()
}

// attachControlPlane makes the bridge in the control plane's namespace, and
// connects this machine with it.
func (n network) attachControlPlane(ctx context.Context, m machine) error {
	pid, err := m.pid()
	if err != nil {
		return err
	}
	if err := m.ip(ctx,
		"link add bridge type bridge",
		"addr add "+n.api()+"/24 dev bridge",
		"link set bridge up",
	); err != nil {
		return err
	}
	if err := ip(ctx, fmt.Sprintf("link add %s type veth peer name machine netns %d", clusterName, pid)); err != nil {
		return err
	}
	if err := m.ip(ctx, "link set machine master bridge up"); err != nil {
		return err
	}
	return ip(ctx,
		fmt.Sprintf("addr add %s/24 dev %s", n.host(), clusterName),
		fmt.Sprintf("link set %s up", clusterName),
		fmt.Sprintf("route add %s via %s", n.whole(), n.api()),
	)
}

// attachNode connects a node with the bridge. The control plane, and so this
// machine, and the other nodes reach its pods through its address.
func (n network) attachNode(ctx context.Context, control, node machine, index int) error {
	pid, err := node.pid()
	if err != nil {
		return err
	}
	_ = control.ip(ctx, "link del "+node.name) // of its last life, if it is still there: see detach
	if err := control.ip(ctx,
		fmt.Sprintf("link add %s type veth peer name eth0 netns %d", node.name, pid),
		fmt.Sprintf("link set %s master bridge up", node.name),
		fmt.Sprintf("route replace %s via %s", n.podsOf(index), n.node(index)),
	); err != nil {
		return err
	}
	commands := []string{
		"addr add " + n.node(index) + "/24 dev eth0",
		"link set eth0 up",
		"route add default via " + n.api(),
	}
	for other := range Nodes {
		if other++; other != index {
			commands = append(commands, fmt.Sprintf("route add %s via %s", n.podsOf(other), n.node(other)))
		}
	}
	return node.ip(ctx, commands...)
}

// detach removes the link of this machine. Links vanish with their namespaces, but
// a namespace outlives its processes by as long as TCP still tries to tell others,
// who may be dead as well, that connections have ended.
func detach(ctx context.Context) error {
	err := ip(ctx, "link del "+clusterName)
	if _, gone := os.Stat("/sys/class/net/" + clusterName); errors.Is(gone, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ip runs commands of ip(8) on this machine.
func ip(ctx context.Context, commands ...string) error {
	cmd := exec.CommandContext(ctx, "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
	_, err := output(cmd)
	return err
}

// ip runs commands in the machine's network, in which this machine's processes
// have their numbers.
func (m machine) ip(ctx context.Context, commands ...string) error {
	pid, err := m.pid()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(pid), "--net", "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
	_, err = output(cmd)
	return err
}
