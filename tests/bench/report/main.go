// Command report runs the benchmarks, and makes of what they tell a table on the
// terminal, a JSON file, a plot, and docs/benchmarks.md. `make bench` runs it, at
// the root of the checkout.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// part is benchmarks that are run so many times each. What is measured once in a
// round (a turn of fio, a start) has few rounds, a call that takes a millisecond
// has many.
type part struct {
	pattern      string
	whole, quick int // rounds; 0 is not at all
}

var parts = []part{
	{"^BenchmarkCall$", 320, 10},
	{"^BenchmarkInFlight$", 21, 3},
	{"^BenchmarkManyVolumes$", 200, 30},
	{"^BenchmarkCallInUse$", 60, 0},
	{"^BenchmarkFootprint$", 3, 1},
	{"^BenchmarkStage$", 21, 3},
	{"^BenchmarkSnapshotOfLiveVolume$", 7, 3},
	{"^BenchmarkBlockVolume$", 21, 2},
	{"^BenchmarkFilesystemVolume$", 21, 2},
	{"^BenchmarkFirstWrite$", 3, 1},
	{"^BenchmarkAfterSnapshots$", 3, 1},
	{"^BenchmarkRouter$", 30, 10},
	{"^BenchmarkDelta$", 3, 0},
	{"^BenchmarkRestoreOnAnotherNode$", 3, 0},
}

// result is one benchmark.
type result struct {
	Name    string             `json:"name"` // without "Benchmark" and the number of processors
	Session int                `json:"session"`
	Rounds  int                `json:"rounds"`
	Metrics map[string]float64 `json:"metrics"` // by unit
}

// line is a result on the terminal.
func (one result) line() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%-52s", one.Name)
	for _, unit := range slices.Sorted(maps.Keys(one.Metrics)) {
		if !strings.HasSuffix(unit, "-q1") && !strings.HasSuffix(unit, "-q3") {
			fmt.Fprintf(&text, "  %.4g %s", one.Metrics[unit], unit)
		}
	}
	return text.String()
}

// run is all that is known of what was measured. There is more than one session if
// some of it was measured again.
type run struct {
	Sessions []session `json:"sessions"`
	Results  []result  `json:"results"`
}

func main() {
	if err := mainErr(); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func mainErr() error {
	quick := flag.Bool("quick", false, "the short form, which leaves docs/ as it is")
	only := flag.String("only", "", "run the parts whose pattern contains this")
	out := flag.String("out", "bin/bench", "directory for what the benchmarks wrote, bench.txt, and bench.json and bench.svg")
	docs := flag.String("docs", "", "directory for benchmarks.md and benchmarks.svg; none if empty")
	from := flag.String("from", "", "run nothing: read what the benchmarks wrote from this file")
	add := flag.Bool("add", false, "add to what is in bench.txt; of a benchmark that is there twice the latter counts")
	driver := flag.String("driver", "bin/csi-driver", "the driver as it is released, for its size")
	flag.Parse()
	if err := os.MkdirAll(*out, 0o750); err != nil {
		return err
	}
	written := filepath.Join(*out, "bench.txt")
	source := written
	var failure error // what was measured is told of nevertheless
	if *from != "" {
		source = *from
	} else {
		failure = begin(*driver).measure(*quick, *only, written, *add)
	}
	text, err := os.ReadFile(source)
	if err != nil {
		return firstOf(failure, err)
	}
	r, err := parse(text)
	if err != nil {
		return firstOf(failure, fmt.Errorf("%s: %w", source, err))
	}
	if len(r.Results) == 0 {
		return firstOf(failure, errors.New("no benchmark told anything"))
	}
	if err := r.write(*out, "bench"); err != nil {
		return err
	}
	fmt.Print(r.targets())
	if failure != nil || *docs == "" || *quick {
		return failure
	}
	return r.document(*docs)
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// measure runs the benchmarks and writes to a file the session and all that they
// write. One that fails is told of in the end.
func (s session) measure(quick bool, only, to string, add bool) (err error) {
	mode := os.O_WRONLY | os.O_CREATE | os.O_TRUNC
	if add {
		mode = os.O_WRONLY | os.O_CREATE | os.O_APPEND
	}
	written, err := os.OpenFile(to, mode, 0o600)
	if err != nil {
		return err
	}
	defer written.Close()
	head, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(written, "%s%s\n", sessionKey, head); err != nil {
		return err
	}
	for _, p := range parts {
		rounds := p.whole
		if quick {
			rounds = p.quick
		}
		if rounds == 0 || !strings.Contains(p.pattern, only) {
			continue
		}
		begin := time.Now()
		fmt.Fprintf(os.Stderr, "%s, %d rounds\n", p.pattern, rounds)
		if runErr := p.run(rounds, quick, written); runErr != nil {
			fmt.Fprintf(os.Stderr, "%s: %v; see %s\n", p.pattern, runErr, to)
			err = errors.Join(err, fmt.Errorf("%s: %w", p.pattern, runErr))
		}
		fmt.Fprintf(os.Stderr, "%s took %s\n", p.pattern, time.Since(begin).Round(time.Second))
	}
	return err
}

// run runs one part.
func (p part) run(rounds int, quick bool, written io.Writer) error {
	cmd := exec.Command("go", "test", "-tags", "integration", "-count=1", "-run", "^$", "-bench", p.pattern, "-benchtime", strconv.Itoa(rounds)+"x", "./tests/bench")
	cmd.Env = os.Environ()
	if quick {
		cmd.Env = append(cmd.Env, "ORLOP_BENCH_QUICK=1")
	}
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(io.TeeReader(pipe, written))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if one, ok := parseLine(lines.Text()); ok {
			fmt.Println(one.line())
		}
	}
	return firstOf(lines.Err(), cmd.Wait())
}

// parse reads what measure wrote. Of a benchmark that is there twice the latter
// counts.
func parse(text []byte) (run, error) {
	var r run
	at := map[string]int{}
	for line := range strings.Lines(string(text)) {
		if head, ok := strings.CutPrefix(line, sessionKey); ok {
			var s session
			if err := json.Unmarshal([]byte(head), &s); err != nil {
				return run{}, fmt.Errorf("reading a session: %w", err)
			}
			if len(r.Sessions) > 0 && s.Machine != r.Sessions[0].Machine {
				return run{}, fmt.Errorf("some was measured on %+v, and some on %+v; measure all anew", r.Sessions[0].Machine, s.Machine)
			}
			r.Sessions = append(r.Sessions, s)
			continue
		}
		one, ok := parseLine(line)
		if !ok {
			continue
		}
		if len(r.Sessions) == 0 {
			return run{}, fmt.Errorf("%s is of no session; measure all anew", one.Name)
		}
		one.Session = len(r.Sessions) - 1
		if i, again := at[one.Name]; again {
			r.Results[i] = one
			continue
		}
		at[one.Name] = len(r.Results)
		r.Results = append(r.Results, one)
	}
	return r, nil
}

// parseLine reads one line: "BenchmarkName-8  100  1.5 unit  2 unit"
// (https://go.dev/design/14313-benchmark-format).
func parseLine(line string) (result, bool) {
	fields := strings.Fields(line)
	name, ok := "", len(fields) >= 4
	if ok {
		name, ok = strings.CutPrefix(fields[0], "Benchmark")
	}
	if !ok {
		return result{}, false
	}
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		if _, err := strconv.Atoi(name[i+1:]); err == nil {
			name = name[:i]
		}
	}
	rounds, err := strconv.Atoi(fields[1])
	if err != nil {
		return result{}, false
	}
	one := result{Name: name, Rounds: rounds, Metrics: map[string]float64{}}
	for i := 2; i+1 < len(fields); i += 2 {
		value, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return result{}, false
		}
		one.Metrics[fields[i+1]] = value
	}
	return one, true
}

// write writes bench.json and bench.svg.
func (r run) write(dir, name string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return firstOf(
		os.WriteFile(filepath.Join(dir, name+".json"), append(text, '\n'), 0o600),
		os.WriteFile(filepath.Join(dir, name+".svg"), []byte(r.plot()), 0o600),
	)
}

// get finds a metric of a benchmark.
func (r run) get(name, unit string) (float64, bool) {
	for _, one := range r.Results {
		if one.Name == name {
			v, ok := one.Metrics[unit]
			return v, ok
		}
	}
	return 0, false
}
