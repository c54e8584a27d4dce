package e2e

import (
	"fmt"
	"strconv"
	"strings"
)

// A claim of a class, with a filesystem in its volume.
const claimYAML = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ${claim}}
spec:
  storageClassName: ${class}
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: ${size}}}
`

// The same for a raw block volume.
const blockClaimYAML = claimYAML + `
  volumeMode: Block
`

// A pod that waits until it is told what to do, with a claim at /data.
const podYAML = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: ${claim}}}]
`

// The same, with a raw block volume at /dev/data.
const blockPodYAML = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command: [sh, -c, "trap exit TERM; sleep 1000000 & wait"]
    volumeDevices: [{name: data, devicePath: /dev/data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: ${claim}}}]
`

// onNode is appended to the manifest of a pod that must run on one node.
const onNode = `
  nodeSelector: {kubernetes.io/hostname: ${node}}
`

// rather is appended to the manifest of a pod that would like to run on a
// node, so much that only its volume can keep it away.
const rather = `
  affinity:
    nodeAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: ["${node}"]}]}
`

// fill is a script that writes a file of that many MiB that no one could guess,
// and prints its checksum.
func fill(file string, mib int) string {
	return fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=%d conv=fsync 2>/dev/null; sha256sum <%s", file, mib, file)
}

// sum is a script that prints the checksum of a file.
func sum(file string) string { return "sha256sum <" + file }

// A writer does what a database does with its log: it appends a record, waits
// until it is on stable storage, and goes on with the next. It ends at the
// first error. It runs as the main process of a pod, so that the pod then is
// Failed.
const writerYAML = `
apiVersion: v1
kind: Pod
metadata: {name: ${pod}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: ${image}
    command:
    - sh
    - -ec
    - |
      n=0
      [ ! -e /data/log ] || n=$(tail -n 1 /data/log)
      trap 'exit 0' TERM
      while true; do
        n=$((n+1))
        echo $n | dd of=/data/log oflag=append conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; exit 1; }
        sleep 0.05
      done
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: ${claim}}}]
`

// written gives the number of the last record of a writer. The test fails if
// records are missing or torn.
func (s *space) written(pod string) int {
	s.Helper()
	out := s.sh(pod, `awk 'NR != $1 || NF != 1 { print "line " NR " is " $0; bad = 1; exit } END { if (!bad) print NR }' /data/log`)
	n, err := strconv.Atoi(out)
	if err != nil {
		s.Fatalf("the log that %s writes is broken: %s", pod, out)
	}
	return n
}

// goesOn waits until a writer has written n more records, and gives the number
// of the last.
func (s *space) goesOn(pod string, n int) (now int) {
	s.Helper()
	goal := s.written(pod) + n
	eventually(s.T, pod+" goes on writing", func() error {
		s.unharmed(pod)
		if now = s.written(pod); now < goal {
			return fmt.Errorf("it is at record %d", now)
		}
		return nil
	})
	return now
}

// unharmed fails the test if a pod has ended, or was started again.
func (s *space) unharmed(pod string) {
	s.Helper()
	o, err := kube.CoreV1().Pods(s.name).Get(s.Context(), pod, getNow)
	must(s.T, err)
	for _, c := range o.Status.ContainerStatuses {
		if c.RestartCount > 0 || c.State.Running == nil {
			log, _ := kube.CoreV1().Pods(s.name).GetLogs(pod, newestLog).DoRaw(s.Context())
			s.Fatalf("%s did not go on: restarted %d times, state %+v; it said: %s", pod, c.RestartCount, c.State, log)
		}
	}
}

// number reads what a script prints as a number.
func (s *space) number(pod, script string) int64 {
	s.Helper()
	n, err := strconv.ParseInt(s.sh(pod, script), 10, 64)
	must(s.T, err)
	return n
}

// filesystemSize gives the size in bytes of the filesystem at /data of a pod.
func (s *space) filesystemSize(pod string) int64 {
	s.Helper()
	return s.number(pod, `df -B1 -P /data | awk 'NR == 2 { print $2 }'`)
}

// filesystemType gives the type of the filesystem at /data of a pod.
func (s *space) filesystemType(pod string) string {
	s.Helper()
	return s.sh(pod, `awk '$2 == "/data" { print $3 }' /proc/mounts`)
}

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// quantity writes a number of bytes as YAML wants it.
func quantity(n int64) string { return strconv.FormatInt(n, 10) }

// join makes one text of several documents.
func join(documents ...string) string { return strings.Join(documents, "\n---\n") }
