package sanity

import (
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// The outcomes of a spec.
const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped"
)

// spec is one test case of the JUnit report that Ginkgo writes.
type spec struct {
	Name    string `xml:"name,attr"`
	Status  string `xml:"status,attr"`
	Skipped struct {
		Message string `xml:"message,attr"`
	} `xml:"skipped"`
}

// outcome takes everything that neither passed nor was left out for a failure:
// Ginkgo also knows panicked, timedout, interrupted and aborted. A pending spec
// is one that the suite itself has switched off.
func (s spec) outcome() string {
	switch s.Status {
	case passed:
		return passed
	case skipped, "pending":
		return skipped
	}
	return failed
}

func (s spec) reason() string { return strings.TrimPrefix(s.Skipped.Message, "skipped - ") }

// readReport reads the specs from a JUnit report. Setup and reporting nodes,
// which the report also lists, are not specs unless they failed.
func readReport(path string) ([]spec, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var report struct {
		Specs []spec `xml:"testsuite>testcase"`
	}
	if err := xml.Unmarshal(data, &report); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(report.Specs, func(s spec) bool {
		return !strings.HasPrefix(s.Name, "[It]") && s.outcome() != failed
	}), nil
}

// result is what one run of the suite gave.
type result struct {
	pool, volume string
	specs        []spec
	took         time.Duration
}

func (r result) count(outcome string) int {
	n := 0
	for _, s := range r.specs {
		if s.outcome() == outcome {
			n++
		}
	}
	return n
}

// printTable writes the results as a table, and below it why specs were skipped.
func printTable(w io.Writer, results []result) {
	reasons := map[string]int{}
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\npool\tvolume\tpassed\tfailed\tskipped\ttime\t")
	for _, r := range results {
		fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%d\t%.1fs\t\n", r.pool, r.volume,
			r.count(passed), r.count(failed), r.count(skipped), r.took.Seconds())
		for _, s := range r.specs {
			if s.outcome() != skipped {
				continue
			}
			why := skips[s.reason()]
			if why == "" {
				why = s.reason()
			}
			reasons[why]++
		}
	}
	table.Flush()
	fmt.Fprintf(w, "\nSkipped in all %d runs together, and why:\n", len(results))
	for _, why := range slices.Sorted(maps.Keys(reasons)) {
		fmt.Fprintf(w, "%6d  %s\n", reasons[why], why)
	}
	fmt.Fprintln(w)
}
