package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestRecordsMustBeWholeInOrderAndOfTheRun(t *testing.T) {
	records := func(key string, numbers ...int64) (text string) {
		for _, n := range numbers {
			text += string(record(key, n))
		}
		return text
	}
	for name, test := range map[string]struct {
		text string
		want int64
		fail string
	}{
		"none":              {"", 0, ""},
		"three":             {records("k", 1, 2, 3), 3, ""},
		"one is missing":    {records("k", 1, 3), 0, "record 2 is not"},
		"of another run":    {records("k", 1) + records("other", 2), 0, "record 2 is not"},
		"a byte is changed": {strings.Replace(records("k", 1, 2), "0002", "0003", 1), 0, "record 2 is not"},
		"the last is cut":   {records("k", 1, 2)[:100], 0, "record 2 is cut off after 36 bytes"},
		"zeros at the end":  {records("k", 1) + strings.Repeat("\x00", recordSize), 0, "record 2 is not"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), recordsFile)
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			n, err := readRecords(path, "k")
			wantError(t, err, test.fail)
			if n != test.want {
				t.Errorf("%d records, not %d", n, test.want)
			}
		})
	}
}

func TestACopyHasWhatWasOnDiskBeforeAndNothingBegunAfter(t *testing.T) {
	c := cut{before: 10, after: 12}
	for n, fail := range map[int64]string{9: "only 9", 10: "", 11: "", 12: "", 13: "13 records"} {
		wantError(t, c.holds(n), fail)
	}
}

func TestWriterKnowsWhatIsOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), recordsFile)
	w, err := startWriter(path)
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	const pause = 20 * time.Millisecond
	c, longest, err := w.during(t.Context(), func() (err error) {
		n, err = readRecords(path, w.key)
		w.mu.Lock() // it cannot go on
		defer w.mu.Unlock()
		time.Sleep(pause)
		return err
	})
	w.stop()
	w.stop()
	if err := errors.Join(err, w.failure(), c.holds(n)); err != nil {
		t.Error(err)
	}
	if longest < pause {
		t.Errorf("longest %s, after a pause of %s", longest, pause)
	}
}

func TestWriterTellsItsError(t *testing.T) {
	w, err := startWriter(filepath.Join(t.TempDir(), recordsFile))
	if err != nil {
		t.Fatal(err)
	}
	w.file.Close()
	wantError(t, w.advance(t.Context(), 1000), "file already closed")
	w.stop()
	wantError(t, w.failure(), "file already closed")
}

func TestTreeIsComparedInFull(t *testing.T) {
	for name, test := range map[string]struct {
		change func(dir string) error
		fail   string
	}{
		"as written":       {func(string) error { return nil }, ""},
		"writer's records": {func(dir string) error { return os.WriteFile(filepath.Join(dir, recordsFile), nil, 0o600) }, ""},
		"missing":          {func(dir string) error { return os.Remove(filepath.Join(dir, "folder-001/file-00")) }, "files, not"},
		"too many":         {func(dir string) error { return os.WriteFile(filepath.Join(dir, "more"), nil, 0o600) }, "should not be there"},
		"shorter":          {func(dir string) error { return os.Truncate(filepath.Join(dir, "folder-001/file-00"), 9_000) }, "not as it was written"},
		"one bit": {func(dir string) error {
			path := filepath.Join(dir, "folder-001/file-00")
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text[4711] ^= 1
			return os.WriteFile(path, text, 0o600)
		}, "not as it was written"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			want, err := writeTree(t.Context(), dir, 33*mib)
			if err != nil {
				t.Fatal(err)
			}
			if err := test.change(dir); err != nil {
				t.Fatal(err)
			}
			wantError(t, verifyTree(t.Context(), dir, want), test.fail)
		})
	}
}

func TestExtentIsComparedInFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 4*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &extent{offset: mib, length: 2 * mib}
	wantError(t, e.write(t.Context(), path), "")
	wantError(t, e.verify(t.Context(), path), "")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text[:mib], make([]byte, mib)) || !bytes.Equal(text[3*mib:], make([]byte, mib)) {
		t.Error("bytes around the extent were written")
	}
	text[3*mib-1] ^= 1
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, e.verify(t.Context(), path), "not as it was written")
}

func TestMountsBelowADirectoryAlone(t *testing.T) {
	const text = `22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 7:1 / /tmp/a\040b/state/mounts/default rw,noatime shared:1 - xfs /dev/loop1 rw
41 22 7:2 / /tmp/a\040bc rw - ext4 /dev/loop2 rw
42 22 0:5 /loop3 /tmp/a\040b/targets/disk rw - devtmpfs udev rw
`
	got := parseMounts(text, "/tmp/a b")
	want := []mount{{"/tmp/a b/state/mounts/default", "xfs", "/dev/loop1"}, {"/tmp/a b/targets/disk", "devtmpfs", "udev"}}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%+v, not %+v", got, want)
	}
}

func TestNumbersAreShort(t *testing.T) {
	for got, want := range map[string]string{
		human(0):                          "0 B",
		human(1023):                       "1023 B",
		human(1024):                       "1 KiB",
		human(1536):                       "1.5 KiB",
		human(999 * mib):                  "999 MiB",
		human(1000 * mib):                 "1 GiB",
		human(64 * gib):                   "64 GiB",
		signed(0):                         "0",
		signed(300 * kib):                 "+300 KiB",
		signed(-2 * mib):                  "−2 MiB",
		duration(40 * time.Microsecond):   "0.0 ms",
		duration(1234 * time.Microsecond): "1.2 ms",
		duration(88 * time.Millisecond):   "88 ms",
		duration(1500 * time.Millisecond): "1.5 s",
		count(7):                          "7",
		count(1234567):                    "1,234,567",
	} {
		if got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
}

func TestEveryLineOfTheTableFits(t *testing.T) {
	for _, s := range steps {
		line := "    " + columns(s.title, duration(999*time.Millisecond), signed(-999*kib))
		if n := utf8.RuneCountInString(line); n > 80 || utf8.RuneCountInString(s.title) > titleWidth {
			t.Errorf("%d characters: %s", n, line)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for _, test := range []struct {
		args string
		fail string
	}{
		{"", ""},
		{"--driver /x --dir /tmp --size 64 --fs xfs --verbose", ""},
		{"--size 63", "--size 63 is not from 64 to 65536"},
		{"--size many", "many"},
		{"--fs zfs", `"zfs" is none of ext4`},
		{"--no-such-flag", "no-such-flag"},
		{"more", `"more"`},
	} {
		_, err := parse(strings.Fields(test.args), nil)
		wantError(t, err, test.fail)
	}
	var out bytes.Buffer
	if _, err := parse([]string{"--help"}, &out); !errors.Is(err, flag.ErrHelp) {
		t.Error(err)
	}
	for line := range strings.Lines(out.String()) {
		if utf8.RuneCountInString(line) > 81 { // and the line feed
			t.Errorf("too long: %s", line)
		}
	}
	for _, name := range []string{"--driver", "--dir", "--size", "--fs", "--verbose", "NO_COLOR", "TMPDIR"} {
		if !strings.Contains(out.String(), name) {
			t.Errorf("%s is not explained", name)
		}
	}
}

func TestInterruptEndsTheWork(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := writeTree(ctx, t.TempDir(), mib)
	wantError(t, err, "canceled")
}

func TestLogTail(t *testing.T) {
	var l logBuffer
	if l.tail(2) != "" {
		t.Error(l.tail(2))
	}
	for _, part := range []string{"one\ntw", "o\nthree\n"} {
		if _, err := l.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.tail(2); got != "two\nthree" {
		t.Errorf("%q", got)
	}
}

// wantError wants an error that has the text, or none if that is empty.
func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if text == "" && err != nil {
		t.Errorf("unexpected: %v", err)
	}
	if text != "" && (err == nil || !strings.Contains(err.Error(), text)) {
		t.Errorf("error %v, not one with %q", err, text)
	}
}
