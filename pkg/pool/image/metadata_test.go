package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func exampleVolume() pool.Volume {
	return pool.Volume{
		ID:           "node-1/abcdefghij/pvc-1",
		Name:         "pvc-1",
		RequestName:  "größe <&> \u2028 \"quoted\"",
		Size:         1 << 30,
		Provisioning: pool.Thin,
		Access:       pool.AccessFilesystem,
		Filesystem:   "ext4",
		MkfsOptions:  "-i 8192",
		Source:       pool.Source{SnapshotID: "node-1/abcdefghij/snap"},
		Content:      pool.ContentCopied,
		Created:      time.Date(2026, 11, 23, 1, 2, 3, 4, time.UTC),
	}
}

func mustEncode(t testing.TB, v any) []byte {
	t.Helper()
	data, err := encode(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestMetadataSurvivesTheDisk(t *testing.T) {
	want := exampleVolume()
	var got pool.Volume
	if err := decode(mustEncode(t, want), &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decode = %+v, %v; want %+v", got, err, want)
	}
}

// The files are on users' disks: what version 1 wrote must be read for ever.
func TestAFileOfVersion1IsRead(t *testing.T) {
	const file = `{
  "version": 1,
  "crc32c": "b72b59c4",
  "payload": {
    "id": "node-1/abcdefghij/pvc-1",
    "name": "pvc-1",
    "requestName": "PVC 1",
    "size": 8192,
    "provisioning": "thick",
    "access": "block",
    "ephemeral": true,
    "source": {
      "volumeID": "node-1/abcdefghij/pvc-0"
    },
    "content": "raw",
    "created": "2026-11-23T01:02:03.000000004Z"
  }
}
`
	want := pool.Volume{
		ID: "node-1/abcdefghij/pvc-1", Name: "pvc-1", RequestName: "PVC 1", Size: 8192,
		Provisioning: pool.Thick, Access: pool.AccessBlock, Ephemeral: true,
		Source: pool.Source{VolumeID: "node-1/abcdefghij/pvc-0"}, Content: pool.ContentRaw,
		Created: time.Date(2026, 11, 23, 1, 2, 3, 4, time.UTC),
	}
	var got pool.Volume
	if err := decode([]byte(file), &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decode = %+v, %v; want %+v", got, err, want)
	}
	if again := mustEncode(t, want); string(again) != file { // so that an older driver reads it
		t.Errorf("encode = %s, want %s", again, file)
	}
	if again := mustEncode(t, want); string(again) != file {
		t.Errorf("it is written as\n%s, was\n%s", again, file)
	}
}

func TestPeopleMayIndentAFileAnew(t *testing.T) {
	want := exampleVolume()
	data := mustEncode(t, want)
	var compact, wide bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		t.Fatal(err)
	}
	if err := json.Indent(&wide, data, "\t", "        "); err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{compact.Bytes(), wide.Bytes()} {
		var got pool.Volume
		if err := decode(data, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("decode(%s) = %+v, %v", data, got, err)
		}
	}
}

// Of the whole file only the case of the three outer names can change without
// being noticed, and that means nothing to JSON.
func TestNoBitFlipChangesWhatIsRead(t *testing.T) {
	want := exampleVolume()
	data := mustEncode(t, want)
	unnoticed := 0
	for i := range data {
		for bit := range 8 {
			data[i] ^= 1 << bit
			var got pool.Volume
			switch err := decode(data, &got); {
			case err == nil && !reflect.DeepEqual(got, want):
				t.Errorf("bit %d of byte %d (%q): read as %+v", bit, i, data[i], got)
			case err == nil:
				unnoticed++
			case !errors.Is(err, pool.ErrDamaged):
				t.Errorf("bit %d of byte %d: %v; want ErrDamaged", bit, i, err)
			}
			data[i] ^= 1 << bit
		}
	}
	if letters := len("version") + len("crcc") + len("payload"); unnoticed > letters {
		t.Errorf("%d bit flips went unnoticed, more than the %d letters of the outer names", unnoticed, letters)
	}
}

func TestAFileCutOffAnywhereIsDamaged(t *testing.T) {
	data := mustEncode(t, exampleVolume())
	whole := len(bytes.TrimSpace(data))
	for n := range whole {
		var got pool.Volume
		if err := decode(data[:n], &got); !errors.Is(err, pool.ErrDamaged) {
			t.Errorf("the first %d bytes: %v; want ErrDamaged", n, err)
		}
	}
}

func TestWhatIsNotAMetadataFileIsDamaged(t *testing.T) {
	data := string(mustEncode(t, exampleVolume()))
	for rule, file := range map[string]string{
		"empty":                "",
		"blank":                "   \n",
		"zeros of that length": strings.Repeat("\x00", len(data)),
		"zeros in the middle":  data[:100] + strings.Repeat("\x00", 50) + data[150:],
		"text":                 "hello",
		"another JSON":         `{"hello": "world"}`,
		"a list":               "[" + data + "]",
		"null":                 "null",
		"twice":                data + data,
		"data behind it":       data + "x",
		"a version to come":    strings.Replace(data, `"version": 1`, `"version": 2`, 1),
		"no version":           strings.Replace(data, `"version": 1,`, ``, 1),
		"version 0":            strings.Replace(data, `"version": 1`, `"version": 0`, 1),
		"a version as text":    strings.Replace(data, `"version": 1`, `"version": "1"`, 1),
		"no checksum":          strings.Replace(data, `"crc32c"`, `"crc33c"`, 1),
		"another size":         strings.Replace(data, `"size": 1073741824`, `"size": 1073741825`, 1),
		"a field more":         strings.Replace(data, `"size":`, `"more": 1, "size":`, 1),
		"no payload":           `{"version": 1, "crc32c": "00000000"}`,
		"payload of a list":    `{"version": 1, "crc32c": "` + checksum([]byte("[1]")) + `", "payload": [1]}`,
		"nested too deep":      strings.Repeat(`{"payload":`, 20_000),
	} {
		var got pool.Volume
		if err := decode([]byte(file), &got); !errors.Is(err, pool.ErrDamaged) {
			t.Errorf("%s: %+v, %v; want ErrDamaged", rule, got, err)
		}
	}
}

func TestAVersionToComeIsToldFromDamage(t *testing.T) {
	data := strings.Replace(string(mustEncode(t, exampleVolume())), `"version": 1`, `"version": 7`, 1)
	var got pool.Volume
	err := decode([]byte(data), &got)
	if err == nil || !strings.Contains(err.Error(), "version 7") || !strings.Contains(err.Error(), "version 1") {
		t.Errorf("%v does not say what the file's version is and what the driver's", err)
	}
}

func openRoot(t *testing.T) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func TestAFileIsReplacedWholly(t *testing.T) {
	root := openRoot(t)
	first, second := exampleVolume(), exampleVolume()
	second.Size, second.MkfsOptions = 2<<30, ""
	for _, v := range []pool.Volume{first, second, first} {
		if err := replaceMetadata(root, "volume.json", "staged", v); err != nil {
			t.Fatal(err)
		}
		var got pool.Volume
		if err := readMetadata(root, "volume.json", &got); err != nil || !reflect.DeepEqual(got, v) {
			t.Errorf("read %+v, %v; want %+v", got, err, v)
		}
		if _, err := root.Lstat("staged"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the staged file is left: %v", err)
		}
	}
}

func TestMetadataThatIsNotAPlainFileIsNotRead(t *testing.T) {
	root := openRoot(t)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, mustEncode(t, exampleVolume()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeMetadata(root, "good", exampleVolume()); err != nil {
		t.Fatal(err)
	}
	if err := root.Mkdir("directory", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"link-out": outside, "link-up": "../outside", "link-in": "good", "link-nowhere": "none", "link-loop": "link-loop"} {
		if err := root.Symlink(target, name); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"directory", "link-out", "link-up", "link-in", "link-nowhere", "link-loop", "none", "../outside"} {
		var got pool.Volume
		if err := readMetadata(root, name, &got); err == nil || !reflect.DeepEqual(got, pool.Volume{}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	var got pool.Volume
	if err := readMetadata(root, "none", &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v; want fs.ErrNotExist", err)
	}
}

func TestAHugeFileIsNotReadToItsEnd(t *testing.T) {
	root := openRoot(t)
	f, err := root.Create("huge")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 40); err != nil {
		t.Fatal(err)
	}
	var got pool.Volume
	if err := readMetadata(root, "huge", &got); !errors.Is(err, pool.ErrDamaged) {
		t.Errorf("%v; want ErrDamaged", err)
	}
}

func FuzzMetadata(f *testing.F) {
	whole := mustEncode(f, exampleVolume())
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add(bytes.Replace(whole, []byte(`"version": 1`), []byte(`"version": 2`), 1))
	f.Add(bytes.Replace(whole, []byte(`"size": 1`), []byte(`"size": 2`), 1))
	f.Add(bytes.Replace(whole, []byte(`"payload"`), []byte(`"payload": {}, "payload"`), 1))
	f.Add(bytes.ToUpper(whole))
	f.Add(mustEncode(f, identity{ID: "abcdefghij", Overhead: 1, FilesystemSize: 2}))
	f.Add(mustEncode(f, record{ID: "abcdefghij"}))
	f.Add(mustEncode(f, nil))
	f.Add(mustEncode(f, -1e300))
	f.Add([]byte(`{"version":1,"crc32c":"00000000","payload":{}}`))
	f.Add([]byte(`{"version":1,"crc32c":"` + checksum([]byte(`{}`)) + `","payload": { } }`))
	f.Add([]byte("{}"))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0}, 100))
	f.Fuzz(func(t *testing.T, data []byte) {
		var payload json.RawMessage
		err := decode(data, &payload)
		if err != nil {
			if !errors.Is(err, pool.ErrDamaged) {
				t.Fatalf("%v; want ErrDamaged", err)
			}
		} else {
			// What is accepted must carry its own checksum, and be what the
			// driver would have written.
			if !bytes.Contains(data, []byte(checksum(payload))) {
				t.Errorf("accepted without its checksum %s: %s", checksum(payload), data)
			}
			var again json.RawMessage
			if err := decode(mustEncode(t, payload), &again); err != nil || !bytes.Equal(again, payload) {
				t.Errorf("%s comes back as %s, %v", payload, again, err)
			}
		}
		for _, v := range []any{&pool.Volume{}, &pool.Snapshot{}, &identity{}, &record{}} {
			if err := decode(data, v); err != nil && !errors.Is(err, pool.ErrDamaged) {
				t.Errorf("%T: %v; want ErrDamaged", v, err)
			}
		}
	})
}
