package filesystem

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// maker is the program that makes one type of filesystem.
type maker struct {
	command  string
	defaults []string
	extended string          // what mke2fs's -E gets in any case
	options  map[string]bool // what users may give; true: it takes a value
}

// The options that users may give are those for the shape of a filesystem. The
// ones that name a device or a file, that force, that make less than a whole
// filesystem or set its UUID, which must be unique, are missing on purpose.
//
// An ext4 has blocks of 4 KiB whatever its size. mke2fs takes 1 KiB below
// 512 MiB, which stays for good however large the volume grows, and is less
// than a physical sector of most disks. Its metadata stands together for 64 block
// groups, not 16: an empty filesystem of 1 TiB takes 33 MiB of the disk instead of
// 80, and is made in a good half of the time.
var mkfs = map[Type]maker{
	Ext4: {
		command:  "mkfs.ext4",
		defaults: []string{"-F", "-q", "-m", "0", "-b", "4096", "-G", "64"},
		extended: "nodiscard,assume_storage_prezeroed=1",
		options: map[string]bool{
			"-b": true, "-C": true, "-e": true, "-E": true, "-g": true, "-G": true, "-i": true,
			"-I": true, "-j": false, "-J": true, "-L": true, "-m": true, "-N": true, "-O": true, "-T": true,
		},
	},
	XFS: {
		command:  "mkfs.xfs",
		defaults: []string{"-q", "-f", "-K"},
		options: map[string]bool{
			"-b": true, "-d": true, "-i": true, "-l": true, "-L": true, "-m": true, "-n": true, "-s": true,
		},
	},
	Btrfs: {
		command:  "mkfs.btrfs",
		defaults: []string{"-q", "-f", "-K"},
		options: map[string]bool{
			"-d": true, "--data": true, "-m": true, "--metadata": true, "-M": false, "--mixed": false,
			"-n": true, "--nodesize": true, "-s": true, "--sectorsize": true, "-L": true, "--label": true,
			"-O": true, "--features": true, "-R": true, "--runtime-features": true,
			"--csum": true, "--checksum": true,
		},
	},
}

// Keys that must not stand in the value of an option, as in "-J device=…" and
// "-l logdev=…": they lead to another device, to a file, or away from the
// beginning of this device.
var forbiddenKeys = []string{"device", "file", "logdev", "name", "offset", "rtdev", "uuid"}

// ValidateOptions checks words for the mkfs of a type: every word is an option
// that users may give, or the value of one. ErrOption says which is not. The
// values themselves are left to mkfs.
func ValidateOptions(t Type, words []string) error {
	_, err := parseMkfsOptions(t, words)
	return err
}

type mkfsOption struct {
	name  string
	value string // empty if it takes none
}

func parseMkfsOptions(t Type, words []string) ([]mkfsOption, error) {
	tool := mkfs[t]
	bad := func(word, why string) error {
		return fmt.Errorf("%w: %s %q: %s", ErrOption, tool.command, word, why)
	}
	for _, word := range words {
		if strings.Contains(word, "/") || strings.ContainsFunc(word, unicode.IsControl) {
			return nil, bad(word, "a path or a control character is not accepted")
		}
	}
	var options []mkfsOption
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		// getopt(3) reads "-b4096" and "--label=x" as "-b 4096" and "--label x".
		name, value, glued := word, "", false
		if strings.HasPrefix(word, "--") {
			name, value, glued = strings.Cut(word, "=")
		} else if len(word) > 2 {
			name, value, glued = word[:2], word[2:], true
		}
		takesValue, known := tool.options[name]
		switch {
		case !known:
			return nil, bad(word, "it is not an option that a volume may have")
		case !takesValue && glued:
			return nil, bad(word, "it takes no value")
		case takesValue && !glued && len(words) > 0:
			value, words = words[0], words[1:]
		}
		if takesValue && value == "" {
			return nil, bad(word, "it lacks its value")
		}
		for part := range strings.SplitSeq(value, ",") {
			key, _, _ := strings.Cut(part, "=")
			if slices.Contains(forbiddenKeys, key) && name != "-L" && name != "--label" {
				return nil, bad(part, "it is not an option that a volume may have")
			}
		}
		if strings.HasSuffix(name, "sum") && value != "crc32c" && value != "sha256" {
			return nil, bad(value, "the checksum must be crc32c or sha256, so that RenewUUID can write it")
		}
		options = append(options, mkfsOption{name, value})
	}
	return options, nil
}

// arguments puts the options behind the defaults, because the last one wins.
// All -E become one: of several, mke2fs heeds only the last.
func (m maker) arguments(options []mkfsOption) []string {
	arguments := slices.Clone(m.defaults)
	var extended []string
	if m.extended != "" {
		extended = append(extended, m.extended)
	}
	for _, o := range options {
		switch {
		case o.name == "-E":
			extended = append(extended, o.value)
		case o.value == "":
			arguments = append(arguments, o.name)
		default:
			arguments = append(arguments, o.name, o.value)
		}
	}
	if len(extended) > 0 {
		arguments = append(arguments, "-E", strings.Join(extended, ","))
	}
	return arguments
}
