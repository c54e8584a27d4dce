package upstream

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// The outcomes of a spec.
const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped"
)

// spec is one spec of the report that Ginkgo writes, or another node of the suite,
// such as its setup.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeText            string
	LeafNodeType            string
	State                   string
	Failure                 struct{ Message string }
}

// name is what Ginkgo matches expressions with.
func (s spec) name() string {
	texts := slices.DeleteFunc(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), func(text string) bool { return text == "" })
	return strings.Join(texts, " ")
}

func (s spec) isSpec() bool { return s.LeafNodeType == "It" }

// outcome takes everything that neither passed nor was skipped for a failure:
// Ginkgo also knows panicked, timedout, interrupted, aborted and pending.
func (s spec) outcome() string {
	if s.State == passed || s.State == skipped {
		return s.State
	}
	return failed
}

// reason is the first line of why a spec was skipped or failed.
func (s spec) reason() string {
	line, _, _ := strings.Cut(strings.TrimSpace(s.Failure.Message), "\n")
	return line
}

// readReport reads the specs of a report in Ginkgo's JSON.
func readReport(path string) ([]spec, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var suites []struct{ SpecReports []spec }
	if err := json.Unmarshal(data, &suites); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var all []spec
	for _, suite := range suites {
		all = append(all, suite.SpecReports...)
	}
	return all, nil
}

// result is what one pass gave.
type result struct {
	pass, dir string
	specs     []spec
	took      time.Duration
}

func (r result) of(outcome string) []spec {
	return slices.DeleteFunc(slices.Clone(r.specs), func(s spec) bool { return s.outcome() != outcome })
}

// summarize tells what came of the passes. Failures are also the error.
func summarize(log io.Writer, results []result) error {
	var failures, passes int
	for _, r := range results {
		good, bad, left := r.of(passed), r.of(failed), r.of(skipped)
		failures, passes = failures+len(bad), passes+len(good)
		fmt.Fprintf(log, "\npass %s: %d passed, %d failed, %d skipped in %s\n", r.pass, len(good), len(bad), len(left), r.took.Round(time.Second))
		for _, s := range bad {
			fmt.Fprintf(log, "  failed: %s\n    %s\n", s.name(), s.reason())
		}
		reasons := map[string]int{}
		for _, s := range left {
			reasons[s.reason()]++
		}
		for _, reason := range slices.Sorted(maps.Keys(reasons)) {
			fmt.Fprintf(log, "  %3d skipped: %s\n", reasons[reason], reason)
		}
	}
	fmt.Fprintln(log, "\nleft out, because this cluster cannot run them:")
	for _, e := range exclusions {
		fmt.Fprintf(log, "  %s: %s\n", e.specs, e.reason)
	}
	switch {
	case failures > 0:
		return fmt.Errorf("%d specs failed; reports and logs are in %s", failures, results[0].dir)
	case passes == 0:
		return errors.New("no spec ran: all were skipped")
	}
	return nil
}
