package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const complete = `
pools:
- name: default
  source:
    file: {path: /var/lib/orlop/default.img, size: 20Gi, sparse: true}
  reserve: 10Gi
  overcommit: 1.5
- name: fast
  source:
    device: /dev/disk/by-id/nvme-1
  reserve: 2.5%
- name: srv-1
  source:
    directory: /srv//volumes/
`

func TestACompleteFileIsReadAsWritten(t *testing.T) {
	got, err := Parse([]byte(complete))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{Pools: []Pool{
		{
			Name:       "default",
			Source:     Source{File: &FileSource{Path: "/var/lib/orlop/default.img", Size: 20 << 30, Sparse: true}},
			Reserve:    Reserve{Bytes: 10 << 30},
			Overcommit: 1.5,
		},
		{
			Name:       "fast",
			Source:     Source{Device: "/dev/disk/by-id/nvme-1"},
			Reserve:    Reserve{Percent: 2.5},
			Overcommit: 1,
		},
		{
			Name:       "srv-1",
			Source:     Source{Directory: "/srv/volumes"},
			Reserve:    Reserve{Percent: 5},
			Overcommit: 1,
		},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// pools gives a file with one pool per argument, each in YAML's flow style.
func pools(pool ...string) string {
	return "pools:\n- " + strings.Join(pool, "\n- ") + "\n"
}

func TestWhatIsWrongIsNamedInOneLine(t *testing.T) {
	const dir = "source: {directory: /srv}"
	file := func(fields string) string {
		return pools("{name: a, source: {file: {" + fields + "}}}")
	}
	for name, test := range map[string]struct{ text, want string }{
		"empty file":         {"", "pools: at least one pool must be given"},
		"no pools":           {"pools: []", "pools: at least one pool must be given"},
		"pools without list": {"pools: {name: a}", `pools: {"name":"a"} is not a list`},
		"not a mapping":      {"- a", "the file must be a mapping with the fields pools"},
		"plain text":         {"hello", "the file must be a mapping with the fields pools"},
		"not YAML":           {"pools: [", "yaml: line 1: did not find expected node content"},
		"two documents":      {complete + "---\n" + complete, "only one YAML document may be given, and there is a second"},
		"a repeated field":   {"pools: []\npools: []", `yaml: unmarshal errors: line 2: key "pools" already set in map`},

		"unknown field":            {"pool: []", "pool: unknown field; the known ones are pools"},
		"unknown field of a pool":  {pools("{name: a, " + dir + ", size: 1Gi}"), "pools[0].size: unknown field; the known ones are name, source, reserve, overcommit"},
		"field in wrong case":      {pools("{Name: a, " + dir + "}"), "pools[0].Name: unknown field; the known ones are name, source, reserve, overcommit"},
		"unknown kind of source":   {pools("{name: a, source: {zvol: /dev/zd0}}"), "pools[0].source.zvol: unknown field; the known ones are file, directory, device"},
		"unknown field of a file":  {file("path: /a, size: 1Gi, format: ext4"), "pools[0].source.file.format: unknown field; the known ones are path, size, sparse"},
		"unknown field, unprinted": {"\"a\\nb\": 1", `"a\nb": unknown field; the known ones are pools`},

		"pool that is text": {pools("a"), "pools[0]: must be a mapping with the fields name, source, reserve, overcommit"},
		"no name":           {pools("{" + dir + "}"), `pools[0].name: "" is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends`},
		"name of capitals":  {pools("{name: Fast, " + dir + "}"), `pools[0].name: "Fast" is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends`},
		"name ends in dash": {pools("{name: a-, " + dir + "}"), `pools[0].name: "a-" is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends`},
		"name with newline": {pools(`{name: "a\n", ` + dir + "}"), `pools[0].name: "a\n" is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends`},
		"name too long":     {pools("{name: " + strings.Repeat("a", 64) + ", " + dir + "}"), `pools[0].name: "` + strings.Repeat("a", 64) + `" is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends`},
		"name is a number":  {pools("{name: 1, " + dir + "}"), "pools[0].name: 1 is not text"},
		"name used twice":   {pools("{name: a, "+dir+"}", "{name: b, source: {directory: /b}}", "{name: a, source: {directory: /c}}"), `pools[2].name: "a" is used by pools[0] already`},

		"no source":              {pools("{name: a}"), "pools[0].source: exactly one of file, directory, device must be set; none is"},
		"empty source":           {pools("{name: a, source: {directory: }}"), "pools[0].source: exactly one of file, directory, device must be set; none is"},
		"two sources":            {pools("{name: a, source: {directory: /a, file: {path: /b, size: 1Gi}}}"), "pools[0].source: exactly one of file, directory, device must be set; both file and directory are"},
		"three sources":          {pools("{name: a, source: {directory: /a, device: /b, file: {path: /b, size: 1Gi}}}"), "pools[0].source: exactly one of file, directory, device must be set; all are"},
		"source is text":         {pools("{name: a, source: /srv}"), "pools[0].source: must be a mapping with the fields file, directory, device"},
		"path is empty":          {pools(`{name: a, source: {directory: ""}}`), "pools[0].source.directory: must be set"},
		"path is relative":       {pools("{name: a, source: {directory: srv/volumes}}"), `pools[0].source.directory: "srv/volumes" is not an absolute path`},
		"path with NUL":          {pools(`{name: a, source: {device: "/dev/a\0"}}`), `pools[0].source.device: "/dev/a\x00" holds a NUL`},
		"path is a number":       {pools("{name: a, source: {device: 1}}"), "pools[0].source.device: 1 is not text"},
		"path used twice":        {pools("{name: a, source: {directory: /a}}", "{name: b, source: {directory: /b/../a/}}"), `pools[1].source: "/a" is used by pools[0] already`},
		"path used twice, kinds": {pools("{name: a, source: {device: /a}}", "{name: b, source: {file: {path: /a, size: 1Gi}}}"), `pools[1].source: "/a" is used by pools[0] already`},

		"file is text":       {pools("{name: a, source: {file: /a}}"), "pools[0].source.file: must be a mapping with the fields path, size, sparse"},
		"file, no path":      {file("size: 1Gi"), "pools[0].source.file.path: must be set"},
		"file, relative":     {file("path: a.img, size: 1Gi"), `pools[0].source.file.path: "a.img" is not an absolute path`},
		"file, no size":      {file("path: /a"), "pools[0].source.file.size: must be set"},
		"file too small":     {file("path: /a, size: 511Mi"), "pools[0].source.file.size: 535822336 bytes are too few for a pool: the least is 512Mi"},
		"size without sense": {file("path: /a, size: 20 gigs"), `pools[0].source.file.size: "20 gigs" is not a size such as 20Gi`},
		"size negative":      {file("path: /a, size: -20Gi"), `pools[0].source.file.size: "-20Gi" is not a size such as 20Gi`},
		"size in milli":      {file("path: /a, size: 1000m"), `pools[0].source.file.size: "1000m" is not a size such as 20Gi`},
		"size, exponent":     {file("path: /a, size: 1e999999999"), `pools[0].source.file.size: "1e999999999" is not a size such as 20Gi`},
		"size, float":        {file("path: /a, size: 1.5e+30"), `pools[0].source.file.size: 1.5e+30 is not a size such as 20Gi`},
		"size of 64 bits":    {file("path: /a, size: 8Ei"), `pools[0].source.file.size: "8Ei" is not a whole number of bytes below 8Ei`},
		"size in parts":      {file("path: /a, size: 1073741824.5"), `pools[0].source.file.size: "1073741824.5" is not a whole number of bytes below 8Ei`},
		"size is a truth":    {file("path: /a, size: true"), `pools[0].source.file.size: true is not a size such as 20Gi`},
		"sparse is text":     {file("path: /a, size: 1Gi, sparse: maybe"), `pools[0].source.file.sparse: "maybe" is not true or false`},

		"reserve of everything":  {pools("{name: a, " + dir + ", reserve: 100%}"), `pools[0].reserve: "100%" is not a percentage from 0% to less than 100%`},
		"reserve negative":       {pools("{name: a, " + dir + ", reserve: -1%}"), `pools[0].reserve: "-1%" is not a percentage from 0% to less than 100%`},
		"reserve not a number":   {pools("{name: a, " + dir + ", reserve: NaN%}"), `pools[0].reserve: "NaN%" is not a percentage from 0% to less than 100%`},
		"reserve without a sign": {pools("{name: a, " + dir + ", reserve: 5}"), "pools[0].reserve: 5 is in bytes and cannot be meant; write 5% for a percentage, or at least 1Mi"},
		"reserve without sense":  {pools("{name: a, " + dir + ", reserve: some}"), `pools[0].reserve: "some" is not a size such as 20Gi`},
		"reserve of whole file":  {pools("{name: a, source: {file: {path: /a, size: 1Gi}}, reserve: 1Gi}"), "pools[0].reserve: 1073741824 bytes would leave nothing of the file's 1073741824"},

		"overcommit below one":    {pools("{name: a, " + dir + ", overcommit: 0.9}"), "pools[0].overcommit: 0.9 is not from 1 to 1000"},
		"overcommit beyond sense": {pools("{name: a, " + dir + ", overcommit: 1001}"), "pools[0].overcommit: 1001 is not from 1 to 1000"},
		"overcommit is text":      {pools("{name: a, " + dir + ", overcommit: lots}"), `pools[0].overcommit: "lots" is not a number`},
		"overcommit is no number": {pools("{name: a, " + dir + ", overcommit: .nan}"), "json: unsupported value: NaN"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Parse([]byte(test.text))
			if err == nil {
				t.Fatalf("accepted as %+v", c)
			}
			if err.Error() != test.want {
				t.Errorf("got  %s\nwant %s", err, test.want)
			}
		})
	}
}

func TestSizesAreQuantities(t *testing.T) {
	for text, want := range map[string]int64{
		"20Gi":         20 << 30,
		"1.5Gi":        3 << 29,
		"1G":           1e9,
		"1Ti":          1 << 40,
		"1073741824":   1 << 30,
		`"1073741824"`: 1 << 30,
		"512Mi":        MinFileSize,
	} {
		c, err := Parse([]byte(pools("{name: a, source: {file: {path: /a, size: " + text + "}}}")))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := c.Pools[0].Source.File.Size; got != want {
			t.Errorf("%s is read as %d, want %d", text, got, want)
		}
	}
}

func TestReserveIsAShareOrAnAmount(t *testing.T) {
	const capacity = 1 << 30
	for text, want := range map[string]int64{
		"":                    capacity / 20,
		"reserve:":            capacity / 20,
		"reserve: 5%":         capacity / 20,
		"reserve: 12.5%":      capacity / 8,
		"reserve: 0%":         0,
		"reserve: 0":          0,
		"reserve: 100Mi":      100 << 20,
		"reserve: 104857600":  100 << 20,
		`reserve: "1048576"`:  1 << 20,
		"reserve: 25.000000%": capacity / 4,
	} {
		c, err := Parse([]byte(fmt.Sprintf("pools:\n- name: a\n  source: {directory: /srv}\n  %s\n", text)))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := c.Pools[0].Reserve.Of(capacity); got != want {
			t.Errorf("%q reserves %d, want %d", text, got, want)
		}
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "bad.yaml")
	for path, text := range map[string]string{good: complete, bad: "pools: []"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := Load(good); err != nil || len(c.Pools) != 3 {
		t.Errorf("got %d pools and error %v", len(c.Pools), err)
	}
	_, err := Load(bad)
	if want := "configuration " + bad + ": pools: at least one pool must be given"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	absent := filepath.Join(dir, "absent.yaml")
	_, err = Load(absent)
	if want := "configuration: open " + absent + ": no such file or directory"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// FuzzParse: no text makes Parse panic, an error is one line, and what parses
// keeps every promise of the types.
func FuzzParse(f *testing.F) {
	f.Add([]byte(complete))
	f.Add([]byte(pools("{name: a, source: {file: {path: /a, size: 1e9}}, reserve: 5%, overcommit: 1.0}")))
	f.Add([]byte("pools: &a [*a]"))
	f.Add([]byte("pools:\n- {name: a, source: {directory: /srv, reserve: .inf}}\n---\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\r") {
				t.Errorf("an error of several lines: %q", err)
			}
			return
		}
		if len(c.Pools) == 0 {
			t.Error("no pools")
		}
		names, paths := map[string]bool{}, map[string]bool{}
		for _, p := range c.Pools {
			path := p.Source.Path()
			if names[p.Name] || paths[path] {
				t.Errorf("%q or its path is there twice", p.Name)
			}
			names[p.Name], paths[path] = true, true
			if len(p.Name) > 63 || !poolName.MatchString(p.Name) {
				t.Errorf("name %q", p.Name)
			}
			if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
				t.Errorf("path %q", path)
			}
			sources := 0
			for _, set := range []bool{p.Source.File != nil, p.Source.Directory != "", p.Source.Device != ""} {
				if set {
					sources++
				}
			}
			if sources != 1 {
				t.Errorf("%d sources", sources)
			}
			const capacity = 1 << 50
			if r := p.Reserve.Of(capacity); r < 0 || p.Reserve.Bytes == 0 && r >= capacity || p.Reserve.Bytes != 0 && p.Reserve.Percent != 0 {
				t.Errorf("reserve %+v", p.Reserve)
			}
			if f := p.Source.File; f != nil && (f.Size < MinFileSize || p.Reserve.Of(f.Size) >= f.Size) {
				t.Errorf("file %+v with reserve %+v", f, p.Reserve)
			}
			if !(p.Overcommit >= 1 && p.Overcommit <= MaxOvercommit) {
				t.Errorf("overcommit %v", p.Overcommit)
			}
		}
	})
}
