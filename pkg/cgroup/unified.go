package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// limitUnified sets limits in cgroup v2, where those of a cgroup hold for all
// below it together.
func limitUnified(dir string, device uint64, l Limits) error {
	file := filepath.Join(dir, "io.max")
	now, err := readUnified(file, device)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the io controller is off in %s; the kubelet turns it on if it is on in the cgroup above", ErrUnsupported, dir)
	}
	if err != nil || now == l {
		return err
	}
	return writeUnified(file, device, l)
}

func writeUnified(file string, device uint64, l Limits) error {
	value := func(n int64) string {
		if n == 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	return write(file, fmt.Sprintf("%s rbps=%s wbps=%s riops=%s wiops=%s", number(device),
		value(l.ReadBandwidth), value(l.WriteBandwidth), value(l.ReadIOPS), value(l.WriteIOPS)))
}

// readUnified reads the limits on a device: of lines such as
// "7:3 rbps=1048576 wbps=max riops=max wiops=max".
func readUnified(file string, device uint64) (Limits, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return Limits{}, err
	}
	var l Limits
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != number(device) {
			continue
		}
		for _, word := range words[1:] {
			key, value, _ := strings.Cut(word, "=")
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				continue // max
			}
			switch key {
			case "rbps":
				l.ReadBandwidth = n
			case "wbps":
				l.WriteBandwidth = n
			case "riops":
				l.ReadIOPS = n
			case "wiops":
				l.WriteIOPS = n
			}
		}
	}
	return l, nil
}

// write gives a cgroup's file a line.
func write(file, line string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(line + "\n"); err != nil {
		return fmt.Errorf("writing %q: %w", line, err)
	}
	return nil
}
