package loop

import (
	"strings"
	"testing"
)

func TestOnlyWholeLoopDevicesAreLoopDevices(t *testing.T) {
	for name, want := range map[string]int{
		"loop0": 0, "loop7": 7, "loop1048575": 1048575,
		"loop": -1, "loop0p1": -1, "loop-1": -1, "loop-control": -1, "sda": -1, "": -1,
	} {
		n, ok := index(name)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("index(%q) = %d, %v; want %d", name, n, ok, want)
		}
	}
}

func TestALabelThatDoesNotFitIsRefused(t *testing.T) {
	if _, err := Attach(nil, Options{Label: strings.Repeat("x", 64)}); err == nil {
		t.Error("64 bytes were accepted; the kernel would cut them")
	}
}
