package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// checkScript defines what the pods of chaos check themselves with: check prints
// how many records there are, or which is broken, and rest whether the bytes at
// rest are as they were written.
const checkScript = `
check() {
  awk '{ if (NR != $1 || NF != 2 || $2 != ($1 * 7919 + 104729) % 1000003) { print "record " NR " is " $0; bad = 1; exit } } END { if (!bad) print NR }' "$1/log"
}
rest() {
  [ "$(sha256sum <"$1/rest")" = "$(cat "$1/sum")" ] && echo whole || echo "the bytes at rest are not what was written"
}
`

// chaosSetYAML is a StatefulSet with a replica on each node. Each appends records to
// its volume and syncs them one by one, and reads all that it has when it starts
// and now and then. What it finds wrong, and an error that it meets, ends it with
// code 3.
const chaosSetYAML = `
apiVersion: v1
kind: Service
metadata: {name: ${set}}
spec: {clusterIP: None, selector: {app: ${set}}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: ${set}}
spec:
  serviceName: ${set}
  replicas: ${replicas}
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: ${set}}}
  template:
    metadata: {labels: {app: ${set}}}
    spec:
      terminationGracePeriodSeconds: 2
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: ${set}}}}
      containers:
      - name: main
        image: ${image}
        command:
        - sh
        - -c
        - |
          ${check}
          trap 'exit 0' TERM
          wrong() { echo "$*" | tee /dev/termination-log; exit 3; }
          if [ ! -e /data/sum ]; then
            dd if=/dev/urandom of=/data/rest bs=1M count=8 conv=fsync 2>/dev/null || wrong "writing the bytes at rest"
            sha256sum </data/rest >/data/new && sync && mv /data/new /data/sum && sync || wrong "writing their sum"
          fi
          touch /data/log
          n=$(check /data)
          while true; do
            case $n in *[!0-9]*|'') wrong "$n";; esac
            all=$(rest /data)
            [ "$all" = whole ] || wrong "$all"
            for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40; do
              n=$((n+1))
              echo "$n $(((n * 7919 + 104729) % 1000003))" | dd of=/data/log oflag=append conv=notrunc,fsync 2>/tmp/error || wrong "record $n: $(cat /tmp/error)"
              sleep 0.1
            done
            n=$(check /data)
          done
        volumeMounts: [{name: data, mountPath: /data}]
        readinessProbe: {exec: {command: [test, -s, /data/log]}, periodSeconds: 1, timeoutSeconds: 30}
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      storageClassName: ${class}
      accessModes: [ReadWriteOnce]
      resources: {requests: {storage: ${size}}}
`

// chaos is StatefulSets that check their own data, and what was done to them and
// around them.
type chaos struct {
	pods  []string // of the sets
	until time.Time
	seed  uint64

	strikes, restores, fresh, replaced, records, bytes atomic.Int64
}

func chaosSetting[T any](t *testing.T, name string, fallback T, parse func(string) (T, error)) T {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	value, err := parse(text)
	must(t, err)
	return value
}

// Kubelets, and pods of the driver on nodes and of its controller, are killed at
// random under StatefulSets that check their own data, while volumes are made,
// snapshots cut and restored, on any node, and all of that deleted. No record that
// was synced is ever missing, and in the end there is nothing that nobody asked
// for.
//
// ORLOP_CHAOS_DURATION is how long it goes on, and ORLOP_CHAOS_SEED what the choices
// of each of those who do something follow from.
func TestChaos(t *testing.T) {
	s := newSpace(t)
	c := &chaos{
		seed:  chaosSetting(t, "ORLOP_CHAOS_SEED", rand.Uint64N(1e9), func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }),
		until: time.Now().Add(chaosSetting(t, "ORLOP_CHAOS_DURATION", 2*time.Minute, time.ParseDuration)),
	}
	t.Logf("ORLOP_CHAOS_SEED=%d", c.seed)
	volumesBefore, snapshotsBefore := count(t, "orlop_pool_volumes"), count(t, "orlop_pool_snapshots")
	for set, class := range map[string]string{"ext4": "orlop", "xfs": "orlop-xfs"} {
		s.apply(strings.ReplaceAll(chaosSetYAML, "${check}", strings.ReplaceAll(strings.TrimSpace(checkScript), "\n", "\n          ")),
			"set", set, "class", class, "size", "320Mi", "replicas", strconv.Itoa(len(nodes)))
		for i := range nodes {
			c.pods = append(c.pods, fmt.Sprintf("%s-%d", set, i))
		}
	}
	s.runs(c.pods...)
	t.Cleanup(func() { // whatever has happened
		for _, node := range nodes {
			if err := machineOf(t, node).StartKubelet(context.Background()); err != nil {
				t.Logf("the kubelet of %s: %v", node, err)
			}
		}
	})
	t.Run("all", func(t *testing.T) {
		t.Run("strikes", func(t *testing.T) {
			t.Parallel()
			c.strike(s.within(t), rand.New(rand.NewPCG(c.seed, 0)))
		})
		for i := range 3 {
			t.Run(fmt.Sprintf("user-%d", i), func(t *testing.T) {
				t.Parallel()
				c.use(s.within(t), fmt.Sprintf("u%d", i), rand.New(rand.NewPCG(c.seed, uint64(i+1))))
			})
		}
	})
	for _, node := range nodes {
		served(t, node)
	}
	for _, set := range []string{"ext4", "xfs"} {
		await(t, s.in("statefulsets.apps"), set, "whole", func(o *appsv1.StatefulSet) (bool, error) {
			return o != nil && int(o.Status.ReadyReplicas) == len(nodes), nil
		})
	}
	for _, pod := range c.pods {
		n := c.whole(s, pod, 0)
		c.records.Add(n)
		c.unharmed(s, pod)
	}
	t.Logf("seed %d: %d strikes, %d restores and %d new volumes compared, %d pods replaced, %d records written, %d MiB compared, besides what the pods compare themselves",
		c.seed, c.strikes.Load(), c.restores.Load(), c.fresh.Load(), c.replaced.Load(), c.records.Load(), c.bytes.Load()/mib)

	eventually(t, "there are the volumes of the sets, and no other", func() error {
		if got := count(t, "orlop_pool_volumes") - volumesBefore; got != len(c.pods) {
			return fmt.Errorf("there are %d volumes, want %d", got, len(c.pods))
		}
		if got := count(t, "orlop_pool_snapshots") - snapshotsBefore; got != 0 {
			return fmt.Errorf("there are %d snapshots", got)
		}
		return nil
	})
	setGracePeriod(t, "1s")
	t.Cleanup(func() { setGracePeriod(t, "1h") })
	eventually(t, "there is no orphan", func() error {
		if out := orphans(t); strings.Contains(out, "volume/") || strings.Contains(out, "snapshot/") {
			return errors.New(out)
		}
		return nil
	})
}

// within gives the space to a subtest, so that what fails there fails that.
func (s *space) within(t *testing.T) *space {
	t.Helper()
	return &space{T: t, name: s.name, since: s.since}
}

// strike kills something, again and again.
func (c *chaos) strike(s *space, r *rand.Rand) {
	ctx := context.Background()
	now := metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}
	for time.Now().Before(c.until) {
		time.Sleep(time.Duration(2000+r.IntN(6000)) * time.Millisecond)
		node, last := nodes[r.IntN(len(nodes))], time.Duration(r.IntN(8000))*time.Millisecond
		what := []string{"kubelet", "node", "node", "controller", "controller", "pod"}[r.IntN(6)]
		s.Logf("%s kill %s, %s", time.Now().Format(time.TimeOnly), what, node)
		switch what {
		case "kubelet":
			m := machineOf(s.T, node)
			must(s.T, m.StopKubelet(ctx))
			time.Sleep(last)
			must(s.T, m.StartKubelet(ctx))
		case "pod":
			remove(s.T, s.in(pods), c.pods[r.IntN(len(c.pods))])
			c.replaced.Add(1)
		default:
			list, err := kube.CoreV1().Pods(system).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=orlop,app.kubernetes.io/component=" + what})
			must(s.T, err)
			for _, p := range list.Items {
				if what == "node" && p.Spec.NodeName != node || what == "controller" && r.IntN(2) == 0 {
					continue
				}
				if err := kube.CoreV1().Pods(system).Delete(ctx, p.Name, now); err != nil && !apierrors.IsNotFound(err) {
					s.Errorf("killing %s: %v", p.Name, err)
				}
			}
		}
		c.strikes.Add(1)
		for _, pod := range c.pods {
			c.unharmed(s, pod)
		}
	}
}

// unharmed fails the test if a pod of a set has found something wrong.
func (c *chaos) unharmed(s *space, pod string) {
	s.Helper()
	o, err := kube.CoreV1().Pods(s.name).Get(context.Background(), pod, getNow)
	if apierrors.IsNotFound(err) {
		return // it is being replaced
	}
	must(s.T, err)
	for _, status := range o.Status.ContainerStatuses {
		for _, state := range []corev1.ContainerState{status.State, status.LastTerminationState} {
			if ended := state.Terminated; ended != nil && ended.ExitCode == 3 {
				s.Fatalf("%s has found: %s", pod, ended.Message)
			}
		}
	}
}

// whole checks the data at /data of a pod, which must have at least so many
// records. It gives how many it has.
func (c *chaos) whole(s *space, pod string, least int64) (n int64) {
	s.Helper()
	var out string
	eventually(s.T, "the data of "+pod+" can be read", func() (err error) {
		out, err = s.try(pod, checkScript+"check /data; rest /data")
		return err
	})
	records, rest, _ := strings.Cut(out, "\n")
	n, err := strconv.ParseInt(records, 10, 64)
	if err != nil || rest != "whole" {
		s.Fatalf("%s: %s", pod, out)
	}
	if n < least {
		s.Fatalf("%s has %d records of %d that were synced", pod, n, least)
	}
	c.bytes.Add(8 * mib)
	return n
}

// use does what a user does, again and again, and compares what comes of it.
func (c *chaos) use(s *space, name string, r *rand.Rand) {
	for i := 0; time.Now().Before(c.until); i++ {
		this := fmt.Sprintf("%s-%d", name, i)
		if r.IntN(3) == 0 {
			c.useNew(s, this, r)
		} else {
			c.useCopy(s, this, r)
		}
	}
}

// useCopy cuts a snapshot of a volume of a set, restores it on some node, and
// compares.
func (c *chaos) useCopy(s *space, name string, r *rand.Rand) {
	s.Helper()
	source, node, early := c.pods[r.IntN(len(c.pods))], nodes[r.IntN(len(nodes))], r.IntN(2) == 0
	class := map[string]string{"ext4": "orlop", "xfs": "orlop-xfs"}[strings.Split(source, "-")[0]]
	var least int64
	eventually(s.T, "how far "+source+" is", func() error {
		out, err := s.try(source, "tail -n 1 /data/log")
		if err == nil {
			_, err = fmt.Sscan(out, &least)
		}
		return err
	})
	least-- // the last may not have been synced yet
	s.apply(snapshotYAML, "snapshot", name, "claim", "data-"+source)
	s.cut(name)
	s.apply(join(restoreYAML, podYAML+onNode), "restored", name, "class", class, "size", "320Mi", "snapshot", name, "claim", name, "pod", name, "node", node)
	s.runs(name)
	c.whole(s, name, least)
	if early { // before what was made of it
		s.delete(snapshots, name)
	}
	s.delete(pods, name)
	s.delete(claims, name)
	if !early {
		s.delete(snapshots, name)
	}
	c.restores.Add(1)
}

// useNew makes a volume, writes to it, and compares what another pod finds.
func (c *chaos) useNew(s *space, name string, r *rand.Rand) {
	s.Helper()
	class, node := []string{"orlop", "orlop-xfs"}[r.IntN(2)], nodes[r.IntN(len(nodes))]
	s.apply(join(claimYAML, podYAML+onNode), "claim", name, "class", class, "size", "320Mi", "pod", name, "node", node)
	s.runs(name)
	var want string
	eventually(s.T, name+" can be written", func() (err error) {
		want, err = s.try(name, fill("/data/file", 4))
		return err
	})
	s.delete(pods, name)
	s.apply(podYAML, "claim", name, "pod", name+"-again")
	s.runs(name + "-again")
	eventually(s.T, name+" can be read", func() error {
		got, err := s.try(name+"-again", sum("/data/file"))
		if err == nil && got != want {
			s.Fatalf("the file of %s was %s, and is %s", name, want, got)
		}
		return err
	})
	s.delete(pods, name+"-again")
	s.delete(claims, name)
	c.fresh.Add(1)
	c.bytes.Add(4 * mib)
}
