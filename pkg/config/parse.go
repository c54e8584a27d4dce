package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"
	goyaml "sigs.k8s.io/yaml/goyaml.v2"
)

// Parse reads and checks the text of a configuration file. It is strict: a
// field that is unknown, repeated or of the wrong type is an error. Every error
// is one line that names the field.
func Parse(text []byte) (Config, error) {
	if err := oneDocument(text); err != nil {
		return Config{}, err
	}
	raw, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return Config{}, oneLine(err)
	}
	file, err := objectAt("", raw, "pools")
	if err != nil {
		return Config{}, err
	}
	var list []json.RawMessage
	if err := file.read("pools", "a list", &list); err != nil {
		return Config{}, err
	}
	if len(list) == 0 {
		return Config{}, errors.New("pools: at least one pool must be given")
	}
	var c Config
	for i, raw := range list {
		p, err := parsePool(fmt.Sprintf("pools[%d]", i), raw)
		if err != nil {
			return Config{}, err
		}
		for j, other := range c.Pools {
			if other.Name == p.Name {
				return Config{}, fmt.Errorf("pools[%d].name: %q is used by pools[%d] already", i, p.Name, j)
			}
			if other.Source.Path() == p.Source.Path() {
				return Config{}, fmt.Errorf("pools[%d].source: %q is used by pools[%d] already", i, p.Source.Path(), j)
			}
		}
		c.Pools = append(c.Pools, p)
	}
	return c, nil
}

// oneDocument refuses what follows the first YAML document: the decoder would
// leave it unread without a word.
func oneDocument(text []byte) error {
	d := goyaml.NewDecoder(bytes.NewReader(text))
	var document any
	for n := 0; ; n++ {
		err := d.Decode(&document)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return oneLine(err)
		case n == 1:
			return errors.New("only one YAML document may be given, and there is a second")
		}
	}
}

// oneLine gives the YAML decoder's errors without their line breaks.
func oneLine(err error) error {
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}

var poolName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

func parsePool(path string, raw json.RawMessage) (Pool, error) {
	o, err := objectAt(path, raw, "name", "source", "reserve", "overcommit")
	if err != nil {
		return Pool{}, err
	}
	p := Pool{Reserve: Reserve{Percent: DefaultReserve}, Overcommit: 1}
	if err := o.read("name", "text", &p.Name); err != nil {
		return Pool{}, err
	}
	if len(p.Name) > 63 || !poolName.MatchString(p.Name) {
		return Pool{}, o.errorf("name", "%.70q is not a name: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends", p.Name)
	}
	if p.Source, err = parseSource(o.at("source"), o.fields["source"]); err != nil {
		return Pool{}, err
	}
	if o.has("reserve") {
		if p.Reserve, err = parseReserve(o.fields["reserve"]); err != nil {
			return Pool{}, o.errorf("reserve", "%w", err)
		}
	}
	if f := p.Source.File; f != nil && p.Reserve.Bytes >= f.Size {
		return Pool{}, o.errorf("reserve", "%d bytes would leave nothing of the file's %d", p.Reserve.Bytes, f.Size)
	}
	if err := o.read("overcommit", "a number", &p.Overcommit); err != nil {
		return Pool{}, err
	}
	if !(p.Overcommit >= 1 && p.Overcommit <= MaxOvercommit) {
		return Pool{}, o.errorf("overcommit", "%v is not from 1 to %d", p.Overcommit, MaxOvercommit)
	}
	return p, nil
}

func parseSource(path string, raw json.RawMessage) (Source, error) {
	kinds := []string{"file", "directory", "device"}
	o, err := objectAt(path, raw, kinds...)
	if err != nil {
		return Source{}, err
	}
	set := slices.DeleteFunc(slices.Clone(kinds), func(kind string) bool { return !o.has(kind) })
	if len(set) != 1 {
		found := "none is"
		switch len(set) {
		case 2:
			found = "both " + strings.Join(set, " and ") + " are"
		case 3:
			found = "all are"
		}
		return Source{}, fmt.Errorf("%s: exactly one of %s must be set; %s", path, strings.Join(kinds, ", "), found)
	}
	var s Source
	switch set[0] {
	case "file":
		s.File, err = parseFile(o.at("file"), o.fields["file"])
	case "directory":
		s.Directory, err = o.path("directory")
	case "device":
		s.Device, err = o.path("device")
	}
	return s, err
}

func parseFile(path string, raw json.RawMessage) (*FileSource, error) {
	o, err := objectAt(path, raw, "path", "size", "sparse")
	if err != nil {
		return nil, err
	}
	var f FileSource
	if f.Path, err = o.path("path"); err != nil {
		return nil, err
	}
	if !o.has("size") {
		return nil, o.errorf("size", "must be set")
	}
	if f.Size, err = parseQuantity(o.fields["size"]); err != nil {
		return nil, o.errorf("size", "%w", err)
	}
	if f.Size < MinFileSize {
		return nil, o.errorf("size", "%d bytes are too few for a pool: the least is %dMi", f.Size, MinFileSize>>20)
	}
	if err := o.read("sparse", "true or false", &f.Sparse); err != nil {
		return nil, err
	}
	return &f, nil
}

func parseReserve(raw json.RawMessage) (Reserve, error) {
	var text string
	if json.Unmarshal(raw, &text) == nil && strings.HasSuffix(text, "%") {
		percent, err := strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
		if err != nil || !(percent >= 0 && percent < 100) {
			return Reserve{}, fmt.Errorf("%.40q is not a percentage from 0%% to less than 100%%", text)
		}
		return Reserve{Percent: percent}, nil
	}
	n, err := parseQuantity(raw)
	if err != nil {
		return Reserve{}, err
	}
	// Somebody who forgot the percent sign must not lose the reserve.
	if n > 0 && n < 1<<20 {
		return Reserve{}, fmt.Errorf("%d is in bytes and cannot be meant; write %d%% for a percentage, or at least 1Mi", n, n)
	}
	return Reserve{Bytes: n}, nil
}

// quantity is what of Kubernetes' quantities can be a size. Exponents and
// milli-bytes cannot.
var quantity = regexp.MustCompile(`^[0-9]{1,19}(\.[0-9]{1,19})?([KMGTPE]i|[kMGTPE])?$`)

// parseQuantity reads a size in bytes, 0 or more, written as a number or as a
// Kubernetes quantity.
func parseQuantity(raw json.RawMessage) (int64, error) {
	text := string(raw)
	if err := json.Unmarshal(raw, &text); err != nil && !quantity.Match(raw) {
		return 0, fmt.Errorf("%.40s is not a size such as 20Gi", raw)
	}
	if !quantity.MatchString(text) {
		return 0, fmt.Errorf("%.40q is not a size such as 20Gi", text)
	}
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size such as 20Gi: %w", text, err)
	}
	n := q.Value()
	// ParseQuantity caps what is larger at the largest.
	if q.CmpInt64(n) != 0 || n == math.MaxInt64 {
		return 0, fmt.Errorf("%q is not a whole number of bytes below 8Ei", text)
	}
	return n, nil
}

// object is one mapping of the file.
type object struct {
	where  string // its path in the file, as errors name it; the file itself has none
	fields map[string]json.RawMessage
}

// objectAt reads a mapping that has no fields but the known ones.
func objectAt(where string, raw json.RawMessage, known ...string) (object, error) {
	o := object{where: where}
	if len(raw) > 0 && json.Unmarshal(raw, &o.fields) != nil {
		prefix := where + ": "
		if where == "" {
			prefix = "the file "
		}
		return object{}, fmt.Errorf("%smust be a mapping with the fields %s", prefix, strings.Join(known, ", "))
	}
	for _, field := range slices.Sorted(maps.Keys(o.fields)) {
		if !slices.Contains(known, field) {
			return object{}, o.errorf(field, "unknown field; the known ones are %s", strings.Join(known, ", "))
		}
	}
	return o, nil
}

func (o object) at(field string) string {
	// A field that is unknown can be any text.
	if quoted := strconv.Quote(field); quoted != `"`+field+`"` || field == "" || len(field) > 70 {
		field = fmt.Sprintf("%.70s", quoted)
	}
	if o.where == "" {
		return field
	}
	return o.where + "." + field
}

func (o object) errorf(field, format string, args ...any) error {
	return fmt.Errorf("%s: %w", o.at(field), fmt.Errorf(format, args...))
}

// has tells whether the field is given. YAML's null, which is what a name
// without a value is, is not.
func (o object) has(field string) bool {
	raw, found := o.fields[field]
	return found && string(raw) != "null"
}

// read reads a field, if it is given, into a variable of the type that what
// describes.
func (o object) read(field, what string, into any) error {
	if o.has(field) && json.Unmarshal(o.fields[field], into) != nil {
		return o.errorf(field, "%.40s is not %s", o.fields[field], what)
	}
	return nil
}

// path reads an absolute path.
func (o object) path(field string) (string, error) {
	var p string
	if err := o.read(field, "text", &p); err != nil {
		return "", err
	}
	switch {
	case p == "":
		return "", o.errorf(field, "must be set")
	case strings.ContainsRune(p, 0):
		return "", o.errorf(field, "%q holds a NUL", p)
	case !filepath.IsAbs(p):
		return "", o.errorf(field, "%q is not an absolute path", p)
	}
	return filepath.Clean(p), nil
}
