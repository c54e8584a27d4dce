package pool

import (
	"errors"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// hostileNames are texts that no path component, ID or name may be made of.
var hostileNames = []string{
	"", ".", "..", "/", "../..", "../../etc/passwd", "a/b", "a/../b", "/etc", "a/", "/a",
	"-a", "a-", ".a", "a.", "_a", "a_", "A", "ABC", "a b", " a", "a\t", "a\n", "\na", "a\x00", "\x00", "a\x00b",
	"a\\b", "a:b", "a%2fb", "%2e%2e", "~", "$HOME", "`id`", "a;b", "*", "é", "ａ", "a\u202eb", "a\u2028", "🦀",
	"\xff\xfe", "a\xc0\xafb", strings.Repeat("a", maxName+1), strings.Repeat("a", 128), strings.Repeat("a", 10_000),
	strings.Repeat("../", 1000),
}

func TestAnIDSurvivesParsing(t *testing.T) {
	for _, id := range []ID{
		{"n", "aaaaaaaaaa", "v"},
		{"node-1", "abcdef2345", "pvc-0b9c1c5e-5c3a-4d5e-8f3e-111111111111"},
		{"Node.Example.COM", "z2z3z4z5z6", "a.b_c-d"},
		{strings.Repeat("n", maxNode), strings.Repeat("7", poolIDLen), strings.Repeat("v", maxName)},
	} {
		parsed, err := ParseID(id.String())
		if err != nil || parsed != id {
			t.Errorf("ParseID(%q) = %+v, %v", id, parsed, err)
		}
	}
}

func TestAnIDFitsTheLimitOfCSI(t *testing.T) {
	longest := ID{strings.Repeat("n", maxNode), NewPoolID(), strings.Repeat("v", maxName)}
	if n := len(longest.String()); n > 128 {
		t.Errorf("the longest ID has %d bytes; CSI allows 128", n)
	}
}

func TestWhatIsNotAnIDIsNotFound(t *testing.T) {
	bad := []string{
		"volume", "n/aaaaaaaaaa", "n/aaaaaaaaaa/", "/aaaaaaaaaa/v", "n//v", "//", "n/aaaaaaaaaa/v/", "n/aaaaaaaaaa/v/w",
		"n/aaaaaaaaa/v", "n/aaaaaaaaaaa/v", "n/AAAAAAAAAA/v", "n/aaaaaaaaa1/v", "n/../v", "n/aaaaaaaaaa\n/v",
		"n\n/aaaaaaaaaa/v", "n/aaaaaaaaaa/v\n", " n/aaaaaaaaaa/v",
		strings.Repeat("n", maxNode+1) + "/aaaaaaaaaa/v",
	}
	for _, name := range hostileNames {
		bad = append(bad, name, "n/aaaaaaaaaa/"+name, "n/"+name+"/v")
		if !nodePattern.MatchString(name) || len(name) > maxNode {
			bad = append(bad, name+"/aaaaaaaaaa/v")
		}
	}
	for _, s := range bad {
		if id, err := ParseID(s); !errors.Is(err, ErrNotFound) {
			t.Errorf("ParseID(%.60q) = %+v, %v; want ErrNotFound", s, id, err)
		}
	}
}

func TestAHostileTextIsNoName(t *testing.T) {
	for _, name := range hostileNames {
		if ValidName(name) {
			t.Errorf("ValidName(%.60q) is true", name)
		}
	}
}

func TestARequestsNameIsKeptWhereItCanBe(t *testing.T) {
	for _, name := range []string{"a", "0", "pvc-1", "a.b", "a_b", "a--b", "a..b", strings.Repeat("a", maxName)} {
		if got := NameFor(name); got != name {
			t.Errorf("NameFor(%q) = %q", name, got)
		}
	}
}

func TestAnyOtherNameIsHashed(t *testing.T) {
	seen := map[string]string{}
	for _, name := range hostileNames {
		got := NameFor(name)
		if !ValidName(got) || !strings.HasPrefix(got, "h-") {
			t.Errorf("NameFor(%.60q) = %q", name, got)
		}
		if other, taken := seen[got]; taken {
			t.Errorf("%.60q and %.60q are both %s", name, other, got)
		}
		seen[got] = name
	}
}

// The names are on users' disks: another hash would lose volumes to retries.
func TestTheHashOfANameNeverChanges(t *testing.T) {
	for name, want := range map[string]string{
		"PVC":        "h-" + "d55cba896ae5b06215152f13f18b482b738daa73",
		"größe":      "h-" + "d353a2671b67afff0941ae456e5c76e9394bd657",
		"a/../../b ": "h-" + "4e71ceed8b5b59e3d8f7d68781140d6cbf4ab571",
	} {
		if got := NameFor(name); got != want {
			t.Errorf("NameFor(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestANodesNameIsShortenedToOneThatCanBeALabel(t *testing.T) {
	label := regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	long := strings.Repeat("rack-7.", 30) + "example"
	segments := map[string]string{}
	for _, node := range []string{
		"n", "node-1", "Node_1.example", strings.Repeat("n", maxNode), strings.Repeat("n", maxNode+1),
		long, long + "2", strings.Repeat("n", 38) + strings.Repeat(".", 20) + "n", "a" + strings.Repeat("-", 60) + "b",
	} {
		segment, err := NodeSegment(node)
		if err != nil {
			t.Errorf("NodeSegment(%q): %v", node, err)
		}
		if len(node) <= maxNode && segment != node {
			t.Errorf("NodeSegment(%q) = %q: it was short enough", node, segment)
		}
		if len(segment) > maxNode || !label.MatchString(segment) {
			t.Errorf("NodeSegment(%q) = %q: not the value of a label", node, segment)
		}
		if other, taken := segments[segment]; taken {
			t.Errorf("%q and %q have the same segment %q", node, other, segment)
		}
		segments[segment] = node
		if _, err := ParseID(ID{segment, "aaaaaaaaaa", "v"}.String()); err != nil {
			t.Errorf("an ID of node %q does not parse: %v", node, err)
		}
	}
}

func TestANodesNameHasNothingThatAnIDCannotHave(t *testing.T) {
	for _, node := range []string{"", "a/b", "a b", "a\n", "-a", "a-", ".", "..", "é", "a\x00b"} {
		if segment, err := NodeSegment(node); !errors.Is(err, ErrInvalid) {
			t.Errorf("NodeSegment(%q) = %q, %v; want ErrInvalid", node, segment, err)
		}
	}
}

func TestPoolIDsAreRandom(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := NewPoolID()
		if !poolIDPattern.MatchString(id) {
			t.Fatalf("%q is not a pool ID", id)
		}
		if seen[id] {
			t.Fatalf("%q came twice", id)
		}
		seen[id] = true
	}
}

// mustBeComponent fails the test unless s is one plain component of a path.
func mustBeComponent(t *testing.T, s string) {
	t.Helper()
	switch {
	case s == "" || s == "." || s == ".." || len(s) > 255:
	case strings.ContainsAny(s, "/\\\x00") || strings.ContainsFunc(s, unicode.IsControl):
	case !filepath.IsLocal(s) || filepath.Base(s) != s || filepath.Clean(s) != s:
	default:
		return
	}
	t.Errorf("%q is not a plain path component", s)
}

func FuzzParseID(f *testing.F) {
	for _, name := range hostileNames {
		f.Add(name)
		f.Add("node-1/aaaaaaaaaa/" + name)
		f.Add(name + "/aaaaaaaaaa/v")
		f.Add("node-1/" + name + "/v")
	}
	f.Add("node-1/abcdef2345/pvc-0b9c1c5e")
	f.Add(strings.Repeat("n", maxNode) + "/zzzzzzzzzz/" + strings.Repeat("v", maxName))
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			if !errors.Is(err, ErrNotFound) {
				t.Errorf("ParseID(%q): %v, want ErrNotFound", s, err)
			}
			return
		}
		if id.String() != s {
			t.Errorf("%q parses to %+v, which is %q", s, id, id)
		}
		if len(s) > 128 {
			t.Errorf("an ID of %d bytes was accepted", len(s))
		}
		for _, part := range []string{id.Node, id.Pool, id.Name} {
			mustBeComponent(t, part)
		}
		if NameFor(id.Name) != id.Name {
			t.Errorf("no request can lead to name %q", id.Name)
		}
	})
}

func FuzzNameFor(f *testing.F) {
	for _, name := range hostileNames {
		f.Add(name)
		f.Add(NameFor(name))
	}
	f.Add("pvc-0b9c1c5e-5c3a-4d5e-8f3e-111111111111")
	f.Fuzz(func(t *testing.T, request string) {
		name := NameFor(request)
		mustBeComponent(t, name)
		if !ValidName(name) {
			t.Errorf("NameFor(%q) = %q, which is no name", request, name)
		}
		if again := NameFor(request); again != name {
			t.Errorf("NameFor(%q) = %q, then %q", request, name, again)
		}
		if ValidName(request) != (name == request) {
			t.Errorf("NameFor(%q) = %q: names that are valid stay, no others", request, name)
		}
		id := ID{"node-1", "aaaaaaaaaa", name}
		if parsed, err := ParseID(id.String()); err != nil || parsed != id {
			t.Errorf("ParseID(%q) = %+v, %v", id, parsed, err)
		}
	})
}
