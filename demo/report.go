package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Sizes in bytes.
const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// The widths of the columns; with two blanks before each they fit 80.
const (
	titleWidth = 48
	tookWidth  = 10
	costWidth  = 12
)

// report is what the reader sees.
type report struct {
	out       *os.File
	overwrite bool // the line of a step that goes on is replaced when it is done
	colour    bool
	rows      []row
	err       error // the first of writing
}

type row struct {
	title string
	took  time.Duration
	cost  int64 // bytes
}

// result is what a step tells of itself.
type result struct {
	took  time.Duration // of what is shown; zero is the whole step
	notes []string
}

func newReport(out *os.File) *report {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	terminal := err == nil && os.Getenv("TERM") != "dumb"
	_, noColour := os.LookupEnv("NO_COLOR")
	return &report{out: out, overwrite: terminal, colour: terminal && !noColour}
}

// The colours, as the parameters of the terminal's "select graphic rendition".
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

func (r *report) paint(colour, text string) string {
	if !r.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (r *report) print(text string) { r.write(text + "\n") }

func (r *report) write(text string) {
	if _, err := r.out.WriteString(text); err != nil && r.err == nil {
		r.err = err
	}
}

func (r *report) intro(dir string, size int64) {
	r.print(r.paint(bold, "Orlop on this machine, with no Kubernetes: one driver, one CSI socket."))
	r.print(fmt.Sprintf("Volumes with %s of files are snapshotted, grown and cloned in use, in\n%s, which goes at the end.\n", human(size), dir))
}

// begin shows that a step goes on.
func (r *report) begin(title string) {
	if r.overwrite {
		r.write("  · " + title + " ...")
	}
}

// wipe takes away what begin wrote.
func (r *report) wipe() {
	if r.overwrite {
		r.write("\r\x1b[K")
	}
}

func (r *report) done(title string, res result, cost int64) {
	r.wipe()
	r.rows = append(r.rows, row{title, res.took, cost})
	r.print("  " + r.paint(green, "✓") + " " + columns(title, duration(res.took), signed(cost)))
	for _, note := range res.notes {
		r.print("    " + r.paint(dim, note))
	}
}

func (r *report) fail(title string) {
	r.wipe()
	r.print("  " + r.paint(red, "✗") + " " + title)
}

func (r *report) table(total time.Duration, peak int64) {
	line := strings.Repeat("─", titleWidth+tookWidth+costWidth+2)
	r.print("\n    " + r.paint(bold, columns("Step", "took", "on disk")))
	r.print("    " + line)
	var sum int64
	for _, row := range r.rows {
		sum += row.cost
		r.print("    " + columns(row.title, duration(row.took), signed(row.cost)))
	}
	r.print("    " + line)
	r.print("    " + columns("All, with the time to prepare and to verify", duration(total), signed(sum)))
	r.print(r.paint(dim, "\n    On disk is what the pool's file takes; from the snapshot on, that includes\n    what the writer goes on writing."))
	r.print(fmt.Sprintf("\n%s Every check held, and nothing is left behind. At most %s were on disk\n  at once. To go on: csi-driver standalone --help", r.paint(green, "✓"), human(peak)))
}

func columns(title, took, cost string) string {
	return pad(title, -titleWidth) + " " + pad(took, tookWidth) + " " + pad(cost, costWidth)
}

// pad fills a text to a width in characters: on the left, or if negative on the
// right.
func pad(text string, width int) string {
	blanks := strings.Repeat(" ", max(0, max(width, -width)-utf8.RuneCountInString(text)))
	if width < 0 {
		return text + blanks
	}
	return blanks + text
}

// human gives a size with two or three digits that count.
func human(n int64) string {
	if n < kib {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/kib, "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if value < 1000 {
			break
		}
		value, unit = value/1024, next
	}
	if text := fmt.Sprintf("%.1f", value); value < 10 && !strings.HasSuffix(text, ".0") {
		return text + " " + unit
	}
	return fmt.Sprintf("%.0f %s", value, unit)
}

// signed gives a change of size.
func signed(n int64) string {
	switch {
	case n > 0:
		return "+" + human(n)
	case n < 0:
		return "−" + human(-n)
	default:
		return "0"
	}
}

func duration(d time.Duration) string {
	switch ms := float64(d) / float64(time.Millisecond); {
	case ms < 9.95:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 999.5:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.1f s", ms/1000)
	}
}

// count gives a number with its thousands apart.
func count(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
