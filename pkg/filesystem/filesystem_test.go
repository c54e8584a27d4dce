package filesystem

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for name, want := range map[string]Type{"": Ext4, "ext4": Ext4, "xfs": XFS, "btrfs": Btrfs} {
		if got, err := Parse(name); got != want || err != nil {
			t.Errorf("Parse(%q) = %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"ext3", "XFS", "Ext4", " xfs", "zfs", "xfs\x00"} {
		_, err := Parse(name)
		if !errors.Is(err, ErrOption) || !strings.Contains(err.Error(), "ext4, xfs or btrfs") {
			t.Errorf("Parse(%q): %v", name, err)
		}
	}
}

func TestValidateOptions(t *testing.T) {
	for _, test := range []struct {
		fs     Type
		words  string
		reason string // empty: they are accepted
	}{
		{Ext4, "", ""},
		{Ext4, "-b 1024 -O ^has_journal -m 5", ""},
		{Ext4, "-b1024 -Lname -j", ""},
		{Ext4, "-E stride=16,stripe_width=32 -J size=8", ""},
		{XFS, "-d agcount=8,su=64k,sw=4 -l size=64m -m reflink=0", ""},
		{XFS, "-L -odd", ""},
		{Btrfs, "--csum sha256 --label=name -O ^no-holes -M", ""},

		{Ext4, "-d /etc", "path"},
		{Ext4, "-L a/b", "path"},
		{Ext4, "-L a\x00b", "control"},
		{Ext4, "-L a\x1bb", "control"},
		{Ext4, "loop3", "not an option"},
		{Ext4, "1g", "not an option"},
		{Ext4, "-b 4096 1g", "not an option"},
		{Ext4, "-", "not an option"},
		{Ext4, "--", "not an option"},
		{Ext4, "-d proc", "not an option"},  // copies a folder into the filesystem
		{Ext4, "-F", "not an option"},       // twice, it overrides that the device is in use
		{Ext4, "-n", "not an option"},       // makes nothing
		{Ext4, "-S", "not an option"},       // makes a part
		{Ext4, "-U clear", "not an option"}, // must be unique
		{Ext4, "-jF", "takes no value"},     // two options in one word
		{Ext4, "-b", "lacks its value"},
		{Ext4, "-J device=loop3", "not an option"},
		{Ext4, "-J size=8,device=UUID=0", "not an option"},
		{Ext4, "-E offset=4096", "not an option"},
		{XFS, "-p proto", "not an option"},
		{XFS, "-c options=file", "not an option"},
		{XFS, "-N", "not an option"},
		{XFS, "-r rtdev=loop3", "not an option"},
		{XFS, "-llogdev=loop3", "not an option"},
		{XFS, "-d file,name=image", "not an option"},
		{Btrfs, "-r proc", "not an option"},
		{Btrfs, "--rootdir=proc", "not an option"},
		{Btrfs, "--root proc", "not an option"}, // getopt_long(3) takes it for --rootdir
		{Btrfs, "-U 0", "not an option"},
		{Btrfs, "--mixed=1", "takes no value"},
		{Btrfs, "--label=", "lacks its value"},
		{Btrfs, "--csum xxhash", "crc32c or sha256"},
	} {
		t.Run(string(test.fs)+" "+test.words, func(t *testing.T) {
			err := ValidateOptions(test.fs, strings.Fields(test.words))
			switch {
			case test.reason == "":
				if err != nil {
					t.Error(err)
				}
			case !errors.Is(err, ErrOption) || !strings.Contains(err.Error(), test.reason):
				t.Errorf("got %v, want one with %q", err, test.reason)
			}
		})
	}
	if err := ValidateOptions(Ext4, []string{"-L", ""}); !errors.Is(err, ErrOption) {
		t.Errorf("an empty word: %v", err)
	}
}

// Whatever is accepted, the device stays the only thing named.
func FuzzValidateOptions(f *testing.F) {
	f.Add("-b 1024 -E stride=16")
	f.Add("-d agcount=8 -L x")
	f.Add("--csum=sha256 -M --label x")
	f.Fuzz(func(t *testing.T, line string) {
		words := strings.Split(line, " ")
		for fs, tool := range mkfs {
			parsed, err := parseMkfsOptions(fs, words)
			if err != nil {
				if !errors.Is(err, ErrOption) {
					t.Errorf("%q: %v", words, err)
				}
				continue
			}
			for _, word := range words {
				if strings.ContainsAny(word, "/\x00\n") {
					t.Errorf("%s accepts %q", fs, word)
				}
			}
			rest := tool.arguments(parsed)[len(tool.defaults):]
			for len(rest) > 0 {
				takesValue, known := tool.options[rest[0]]
				if !known || takesValue && len(rest) == 1 {
					t.Fatalf("%s: %q became %q", fs, words, rest)
				}
				if rest = rest[1:]; takesValue {
					rest = rest[1:]
				}
			}
		}
	})
}

func TestTheLastOfSeveralExtendedOptionsIsNotTheOnlyOne(t *testing.T) {
	parsed, err := parseMkfsOptions(Ext4, []string{"-E", "stride=16", "-m", "1", "-Estripe_width=32", "-j"})
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(mkfs[Ext4].arguments(parsed), " ")
	want := "-F -q -m 0 -b 4096 -G 64 -m 1 -j -E nodiscard,assume_storage_prezeroed=1,stride=16,stripe_width=32"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseMountOptions(t *testing.T) {
	for _, test := range []struct {
		options    []string
		attributes int
		parameters string
	}{
		{nil, 0, ""},
		{[]string{"", ",", "defaults,,nofail"}, 0, ""},
		{[]string{"x-initrd.mount", "_netdev,user_xattr"}, 0, "user_xattr"},
		{[]string{"noatime", "commit=5"}, unix.MOUNT_ATTR_NOATIME, "commit=5"},
		{[]string{"noatime,strictatime"}, unix.MOUNT_ATTR_STRICTATIME, ""},
		{[]string{"strictatime,atime"}, 0, ""},
		{[]string{"users,exec"}, unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, ""},
		{[]string{"ro"}, unix.MOUNT_ATTR_RDONLY, "ro"},
		{[]string{"ro,rw"}, 0, "ro rw"},
		{[]string{"key=", "key"}, 0, "key= key"},
		{[]string{"subvol=/a=b"}, 0, "subvol=/a=b"},
		// As the kubelet passes it.
		{[]string{`context="system_u:object_r:container_file_t:s0:c1,c2",nosuid`}, unix.MOUNT_ATTR_NOSUID, "context=system_u:object_r:container_file_t:s0:c1,c2"},
		{[]string{`a="`, `b="",c`}, 0, `a=" b= c`},
	} {
		attributes, parameters, err := parseMountOptions(test.options)
		if err != nil {
			t.Errorf("%q: %v", test.options, err)
		}
		var words []string
		for _, p := range parameters {
			words = append(words, p.String())
		}
		if got := strings.Join(words, " "); attributes != test.attributes || got != test.parameters {
			t.Errorf("%q: %#x and %q, want %#x and %q", test.options, attributes, got, test.attributes, test.parameters)
		}
	}
	for _, option := range []string{"source=x", "device=x", "journal_path=x", "journal_dev=1", "logdev=x", "rtdev=x", "a\x00b"} {
		if _, _, err := parseMountOptions([]string{"noatime," + option}); !errors.Is(err, ErrOption) {
			t.Errorf("%q: %v", option, err)
		}
	}
}

func FuzzParseMountOptions(f *testing.F) {
	f.Add(`noatime,context="a,b",ro`)
	f.Add("device=/dev/sda,x-y")
	f.Fuzz(func(t *testing.T, list string) {
		_, parameters, err := parseMountOptions([]string{list})
		if err != nil && !errors.Is(err, ErrOption) {
			t.Error(err)
		}
		for _, p := range parameters {
			if slices.Contains(forbiddenParameters, p.key) || strings.ContainsRune(p.String(), 0) || p.isFlag && p.value != "" {
				t.Errorf("%q became %+v", list, p)
			}
		}
	})
}

func TestWarningAbout(t *testing.T) {
	for record, want := range map[string]string{
		"3,812,1640731837,-;EXT4-fs (loop3): bad\n SUBSYSTEM=block\n": "EXT4-fs (loop3): bad",
		"4,1,2,-;BTRFS warning (device loop3): odd\n":                 "BTRFS warning (device loop3): odd",
		"6,1,2,-;BTRFS info (device loop3): mounted\n":                "",
		"3,1,2,-;EXT4-fs (loop33): of another\n":                      "",
		"3,1,2,-;EXT4-fs (xloop3): of another\n":                      "",
		"nonsense":                                                    "",
		"":                                                            "",
	} {
		text, ok := warningAbout("loop3", record)
		if ok != (want != "") || ok && text != want {
			t.Errorf("%q: %q, %v", record, text, ok)
		}
	}
}

func TestExcerptKeepsBothEnds(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{" error\n", "error"},
		{"an error\n\n  that has\r\nlines\n", "an error; that has; lines"},
		{strings.Repeat("a", excerptHalf) + strings.Repeat("b", excerptHalf), strings.Repeat("a", excerptHalf) + strings.Repeat("b", excerptHalf)},
		{strings.Repeat("a", 700) + strings.Repeat("b", 700), strings.Repeat("a", excerptHalf) + "…" + strings.Repeat("b", excerptHalf)},
	} {
		for _, step := range []int{1, 7, 600, 2000} {
			var e excerpt
			for chunk := range slices.Chunk([]byte(test.in), step) {
				if n, err := e.Write(chunk); n != len(chunk) || err != nil {
					t.Fatal(n, err)
				}
			}
			if got := e.String(); got != test.want {
				t.Errorf("in steps of %d: %q, want %q", step, got, test.want)
			}
		}
	}
}
