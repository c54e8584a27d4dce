package pool

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// The lengths that make an ID fit the 128 bytes that CSI allows for a string
// (CSI spec v1.13.0, "Size Limits"): 48 + 1 + 10 + 1 + 64 = 124.
const (
	maxNode   = 48
	maxName   = 64
	poolIDLen = 10
)

var (
	namePattern   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9._]*[a-z0-9])?$`)
	nodePattern   = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$`)
	poolIDPattern = regexp.MustCompile(`^[a-z2-7]{10}$`)
)

// ID is the parsed form of a volume's or a snapshot's ID, <node>/<pool>/<name>.
//
// Node tells where the ID was made, for routing; it goes on being part of the
// ID when the host gets another name. Pool is the pool's ID, which is stable on
// disk. Name is unique in the pool among volumes, or among snapshots.
type ID struct {
	Node, Pool, Name string
}

func (id ID) String() string { return id.Node + "/" + id.Pool + "/" + id.Name }

// ParseID takes an ID apart and checks every part. It is never used as a path.
func ParseID(s string) (ID, error) {
	node, rest, _ := strings.Cut(s, "/")
	pool, name, _ := strings.Cut(rest, "/")
	if len(node) > maxNode || !nodePattern.MatchString(node) ||
		!poolIDPattern.MatchString(pool) || !ValidName(name) {
		return ID{}, Errorf(ErrNotFound, "%.130q is not an ID of this driver", s)
	}
	return ID{Node: node, Pool: pool, Name: name}, nil
}

// ValidName reports whether s can be the name of a volume or snapshot in a
// pool, and so of its directory: one path component that is never "." or "..".
func ValidName(s string) bool {
	return len(s) <= maxName && namePattern.MatchString(s)
}

// NameFor gives the name in a pool for the name in a request: itself where it
// can be, else a hash of it. The same request always gets the same name, so
// that a retry finds its volume without an index.
func NameFor(requestName string) string {
	if ValidName(requestName) {
		return requestName
	}
	return "h-" + hash(requestName, 20)
}

// NodeSegment gives the form of a node's name that IDs and the topology carry:
// itself where it is short enough to be part of an ID and the value of a
// Kubernetes label, else its beginning and a hash of it.
func NodeSegment(node string) (string, error) {
	if !nodePattern.MatchString(node) {
		return "", Errorf(ErrInvalid, "node name %.130q: only letters, digits, '-', '_' and '.' are allowed, with a letter or digit at both ends", node)
	}
	if len(node) <= maxNode {
		return node, nil
	}
	sum := hash(node, 4)
	return strings.TrimRight(node[:maxNode-len(sum)-1], "-._") + "-" + sum, nil
}

// NewPoolID makes a random pool ID: 50 bits as base 32.
func NewPoolID() string {
	return strings.ToLower(rand.Text())[:poolIDLen]
}

// hash gives the first n bytes of the SHA-256 of s in hexadecimal.
func hash(s string, n int) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:n])
}

// key names a volume or a snapshot to [Operations].
func key(kind, name string) string { return fmt.Sprintf("%s %s", kind, name) }
