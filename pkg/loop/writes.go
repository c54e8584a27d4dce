package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Writes tells how many writes and discards the device has completed since it is
// one, and how many are under way. What is in the page cache alone is neither.
//
// See Documentation/block/stat.rst of the kernel. A device whose statistics were
// turned off is an error. A write may be answered a moment before it is counted.
func (d Device) Writes() (done uint64, underWay int, err error) {
	sys := filepath.Join("/sys/block", filepath.Base(d.Path))
	if on, err := os.ReadFile(filepath.Join(sys, "queue/iostats")); err != nil {
		return 0, 0, err
	} else if strings.TrimSpace(string(on)) == "0" {
		return 0, 0, fmt.Errorf("%s counts no writes: its statistics are off (%s/queue/iostats is 0)", d.Path, sys)
	}
	stat, err := numbers(filepath.Join(sys, "stat"), 12)
	if err != nil {
		return 0, 0, err
	}
	inFlight, err := numbers(filepath.Join(sys, "inflight"), 2)
	if err != nil {
		return 0, 0, err
	}
	const writes, discards = 4, 11 // the fifth field and the twelfth
	return stat[writes] + stat[discards], int(inFlight[1]), nil
}

// numbers reads a file of at least n numbers.
func numbers(path string, n int) ([]uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []uint64
	for field := range strings.FieldsSeq(string(text)) {
		v, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, v)
	}
	if len(list) < n {
		return nil, errors.New(path + " has too few numbers")
	}
	return list, nil
}
