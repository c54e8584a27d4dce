package upstream

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// suite gives specs with these names and outcomes.
func suite(outcomes map[string]string) []spec {
	var specs []spec
	for name, outcome := range outcomes {
		s := spec{ContainerHierarchyTexts: []string{"External Storage", "[Driver: csi.orlop.dev]"}, LeafNodeText: name, LeafNodeType: "It", State: outcome}
		s.Failure.Message = "why " + name + "\nmore"
		specs = append(specs, s)
	}
	return specs
}

// excluded has a spec for each exclusion.
var excluded = map[string]string{
	"provisions with any volume data source":                              skipped,
	"kubelet [Disruptive]":                                                skipped,
	"mounts [Feature:SELinux]":                                            skipped,
	"volume-modify-stress changes with a different volumeAttributesClass": skipped,
}

func TestWhatIsLeftOutIsNotChosen(t *testing.T) {
	specs := suite(excluded)
	specs = append(specs, suite(map[string]string{"stores data": passed, "grows": passed})...)
	specs = append(specs, spec{ContainerHierarchyTexts: []string{"DNS"}, LeafNodeText: "grows", LeafNodeType: "It"})
	for _, c := range []struct {
		expressions []*regexp.Regexp
		want        []string
	}{
		{nil, []string{"External Storage [Driver: csi.orlop.dev] grows", "External Storage [Driver: csi.orlop.dev] stores data"}},
		{[]*regexp.Regexp{nil, regexp.MustCompile("gro")}, []string{"External Storage [Driver: csi.orlop.dev] grows"}},
		{[]*regexp.Regexp{regexp.MustCompile("data"), regexp.MustCompile("gro")}, nil},
	} {
		got, err := choose(specs, c.expressions...)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v: %q, %v; want %q", c.expressions, got, err, c.want)
		}
	}
}

func TestAnExclusionWithoutSpecsIsAnError(t *testing.T) {
	if names, err := choose(suite(map[string]string{"stores data": passed})); err == nil {
		t.Errorf("chose %q", names)
	}
}

func TestTheSummaryIsAnErrorUnlessSomethingPassedAndNothingFailed(t *testing.T) {
	for _, c := range []struct {
		outcomes map[string]string
		bad      bool
	}{
		{map[string]string{"a": passed, "b": skipped}, false},
		{map[string]string{"a": skipped}, true},
		{map[string]string{"a": passed, "b": failed}, true},
		{map[string]string{"a": passed, "b": "panicked"}, true},
		{map[string]string{"a": passed, "b": "timedout"}, true},
		{map[string]string{"a": passed, "b": "interrupted"}, true},
		{map[string]string{"a": passed, "b": "pending"}, true},
		{map[string]string{"a": passed, "b": ""}, true},
	} {
		var log strings.Builder
		err := summarize(&log, []result{{pass: "ext4", specs: suite(c.outcomes)}})
		if (err != nil) != c.bad {
			t.Errorf("%v: %v", c.outcomes, err)
		}
		for name, outcome := range c.outcomes {
			if outcome != passed && !strings.Contains(log.String(), "why "+name) {
				t.Errorf("%v: the summary does not say why %s %s:\n%s", c.outcomes, name, outcome, &log)
			}
		}
	}
}

func TestReportOfGinkgo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "report.json")
	if err := os.WriteFile(file, []byte(`[{"SuitePath": "/", "SpecReports": [
		{"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "LeafNodeText": "", "State": "passed"},
		{"ContainerHierarchyTexts": ["External Storage", "", "volumes"], "LeafNodeType": "It", "LeafNodeText": "should store data",
		 "State": "skipped", "Failure": {"Message": "no block\nat line 3"}}]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	specs, err := readReport(file)
	if err != nil || len(specs) != 2 {
		t.Fatalf("%v, %v", specs, err)
	}
	s := specs[1]
	if s.name() != "External Storage volumes should store data" || !s.isSpec() || s.outcome() != skipped || s.reason() != "no block" {
		t.Errorf("%q, %v, %s, %q", s.name(), s.isSpec(), s.outcome(), s.reason())
	}
	if specs[0].isSpec() {
		t.Error("the setup of the suite is taken for a spec")
	}
}
