package main

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

// rows are those of the data path; see tests/bench/data_test.go.
var rows = []string{"4k-randread-qd1", "4k-randread-qd16", "4k-randwrite-qd1", "4k-randwrite-qd16", "1M-read", "1M-write", "4k-write-fsync", "4k-mixed-qd16"}

// calls are those that are measured; see tests/bench/control_test.go.
var calls = []string{
	"fsync", "CreateVolume", "CreateVolume-clone", "DeleteVolume", "CreateSnapshot", "ControllerExpandVolume", "GetCapacity", "ListVolumes-10",
	"ControllerGetVolumeHealth", "NodeStageVolume-empty", "NodeStageVolume-formatted", "NodePublishVolume", "NodeUnpublishVolume", "NodeUnstageVolume",
}

//go:embed benchmarks.md.tmpl
var page string

// document writes benchmarks.md, and the plot beside it.
func (r run) document(dir string) error {
	t, err := template.New("benchmarks.md").Funcs(template.FuncMap{
		"calls":       r.calls,
		"inUse":       r.inUse,
		"atOnce":      r.atOnce,
		"footprint":   r.footprint,
		"stage":       r.stage,
		"pause":       r.pause,
		"data":        r.data,
		"filesystems": r.filesystems,
		"grown":       r.grown,
		"firstWrite":  r.firstWrite,
		"snapshotted": r.snapshotted,
		"router":      r.router,
		"targets":     r.targets,
		"sessions":    r.sessions,
		"spread":      r.spread,
		"value":       func(name, unit string, digits int) string { return r.value(name, unit, digits) },
	}).Parse(page)
	if err != nil {
		return err
	}
	var text strings.Builder
	if err := t.Execute(&text, r); err != nil {
		return err
	}
	return firstOf(
		os.WriteFile(filepath.Join(dir, "benchmarks.md"), []byte(text.String()), 0o644),
		os.WriteFile(filepath.Join(dir, "benchmarks.svg"), []byte(r.plot()), 0o644),
	)
}

// Machine is where all was measured.
func (r run) Machine() machine { return r.Sessions[0].Machine }

// sessions tells when and of what it was measured.
func (r run) sessions() string {
	var lines [][]string
	for i, s := range r.Sessions {
		var names []string
		for _, one := range r.Results {
			name, _, _ := strings.Cut(one.Name, "/")
			if one.Session == i && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		if len(names) == 0 {
			continue // all of it was measured again
		}
		size := "-"
		if s.DriverSize > 0 {
			size = fmt.Sprintf("%.1f MiB", float64(s.DriverSize)/(1<<20))
		}
		if s.ImageSize != "" {
			size += ", image " + s.ImageSize
		}
		lines = append(lines, []string{s.Began.Format("2006-01-02 15:04") + " UTC", s.Commit, size, s.Load, strings.Join(names, ", ")})
	}
	return table([]string{"begun", "commit", "driver", "load", "benchmarks"}, lines)
}

// value formats a metric; a dash is that it was not measured.
func (r run) value(name, unit string, digits int) string {
	v, ok := r.get(name, unit)
	if !ok {
		return "-"
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// spread formats a ratio with its quartiles.
func (r run) spread(name, unit string) string {
	if _, ok := r.get(name, unit); !ok {
		return "-"
	}
	return fmt.Sprintf("%s (%s–%s)", r.value(name, unit, 2), r.value(name, unit+"-q1", 2), r.value(name, unit+"-q3", 2))
}

// table makes a table of Markdown.
func table(head []string, lines [][]string) string {
	var text strings.Builder
	write := func(cells []string) { text.WriteString("| " + strings.Join(cells, " | ") + " |\n") }
	write(head)
	text.WriteString(strings.Repeat("|---", len(head)) + "|\n")
	for _, line := range lines {
		if slices.ContainsFunc(line[1:], func(cell string) bool { return cell != "-" }) {
			write(line)
		}
	}
	return text.String()
}

// latency is the median and the 99th percentile of a call, in milliseconds.
func (r run) latency(name string) string {
	if _, ok := r.get(name, "p50-ms"); !ok {
		return "-"
	}
	return r.value(name, "p50-ms", 2) + " / " + r.value(name, "p99-ms", 2)
}

func (r run) calls() string {
	var lines [][]string
	for _, c := range calls {
		at := func(n string) string { return r.latency("Call/volumes=" + n + "/" + c + "/inflight=1") }
		lines = append(lines, []string{c, at("10"), at("1000"), at("10000")})
	}
	return table([]string{"one at a time, ms: p50 / p99", "10 volumes", "1,000", "10,000"}, lines)
}

func (r run) inUse() string {
	var lines [][]string
	for _, c := range calls {
		at := func(n string) string { return r.latency("CallInUse/inuse=" + n + "/" + c + "/inflight=1") }
		lines = append(lines, []string{c, at("10"), at("200")})
	}
	return table([]string{"one at a time, ms: p50 / p99", "10 in use", "200 in use"}, lines)
}

func (r run) atOnce() string {
	var lines [][]string
	for _, c := range calls {
		at := func(n string) string { return r.value("Call/volumes=1000/"+c+"/inflight="+n, "calls/s", 0) }
		lines = append(lines, []string{c, at("1"), at("8"), at("32"), r.latency("Call/volumes=1000/" + c + "/inflight=32")})
	}
	return table([]string{"calls a second", "1 in flight", "8", "32", "32: p50 / p99, ms"}, lines)
}

func (r run) footprint() string {
	var lines [][]string
	for _, n := range []string{"0", "100", "1000", "10000"} {
		at := func(unit string, digits int) string { return r.value("Footprint/volumes="+n+"/process", unit, digits) }
		lines = append(lines, []string{n, at("start-ms", 0), at("idle-MiB", 1), at("idle-cpu-ms/s", 1), at("busy-MiB", 1), at("cpu-ms/volume", 2)})
	}
	return table([]string{"volumes", "start, ms", "idle, MiB", "idle, processor ms a second", "busy, MiB", "processor ms per volume made and removed"}, lines)
}

func (r run) stage() string {
	var lines [][]string
	for _, fs := range []string{"ext4", "xfs"} {
		for _, size := range []string{"1", "1024"} {
			name := "Stage/" + fs + "/size=" + size + "GiB"
			lines = append(lines, []string{fs + ", " + size + " GiB", r.value(name, "stage-ms", 1), r.value(name, "by-hand-ms", 1), r.spread(name, "of-by-hand"), r.value(name, "records-ms", 1), r.spread(name, "of-by-hand-recorded"), r.value(name, "disk-of-by-hand", 3)})
		}
	}
	return table([]string{"", "NodeStageVolume, ms", "by hand, ms", "ratio", "two records, synced, ms", "ratio to by hand and them", "disk taken, ratio"}, lines)
}

func (r run) pause() string {
	var lines [][]string
	for _, kind := range []string{"block", "ext4", "xfs"} {
		name := "SnapshotOfLiveVolume/" + kind + "/pause"
		lines = append(lines, []string{
			kind, r.value(name, "extents", 0), r.value(name, "ficlone-ms", 0), r.value(name, "ficlone-pause-p50-ms", 0) + " / " + r.value(name, "ficlone-pause-max-ms", 0),
			r.value(name, "pause-p50-ms", 0) + " / " + r.value(name, "pause-max-ms", 0), r.value(name, "of-ficlone", 2), r.value(name, "call-ms", 0),
		})
	}
	return table([]string{"volume", "extents", "FICLONE alone, ms", "writer's wait for it, p50 / max", "writer's wait for a snapshot, p50 / max", "p50 / FICLONE alone", "CreateSnapshot, ms"}, lines)
}

func (r run) data() string {
	var lines [][]string
	for _, row := range rows {
		block := "BlockVolume/" + row
		lines = append(lines, []string{
			row, r.spread(block, "thin/loop"), r.spread(block, "thick/loop"), r.spread(block, "loop-again/loop"), r.spread(block, "thin/file"), r.spread(block, "loop/file"),
		})
	}
	return table([]string{"", "block, thin / loop", "block, thick / loop", "a second loop / loop", "block, thin / file", "loop / file"}, lines)
}

func (r run) filesystems() string {
	var lines [][]string
	for _, row := range rows {
		ext4, xfs := "FilesystemVolume/ext4/"+row, "FilesystemVolume/xfs/"+row
		lines = append(lines, []string{
			row, r.spread(ext4, "thin/loop"), r.spread(ext4, "loop-again/loop"), r.spread(xfs, "thin/loop"), r.spread(xfs, "loop-again/loop"),
		})
	}
	return table([]string{"", "ext4 volume / ext4 on loop", "ext4 on a second loop / on loop", "XFS volume / XFS on loop", "XFS on a second loop / on loop"}, lines)
}

func (r run) grown() string {
	var lines [][]string
	for _, c := range calls {
		name := "ManyVolumes/" + c
		lines = append(lines, []string{c, r.value(name, "few-p50-ms", 2), r.value(name, "many-p50-ms", 2), r.value(name, "many/few", 2)})
	}
	return table([]string{"in turns, ms: p50", "10 volumes", "10,000", "ratio"}, lines)
}

func (r run) firstWrite() string {
	var lines [][]string
	for _, row := range []string{"4k-randwrite-qd16", "1M-write"} {
		name := "FirstWrite/" + row
		lines = append(lines, []string{row, r.spread(name, "thin/loop"), r.spread(name, "thick/loop")})
	}
	return table([]string{"", "thin / loop", "thick / loop"}, lines)
}

func (r run) snapshotted() string {
	var lines [][]string
	for _, n := range []string{"1", "10"} {
		for _, row := range []string{"4k-randwrite-qd16", "4k-randread-qd16"} {
			name := "AfterSnapshots/snapshots=" + n + "/" + row
			lines = append(lines, []string{row + ", " + n, r.spread(name, "snapshotted/fresh"), r.spread(name, "reflinked/fresh"), r.spread(name, "snapshotted/reflinked")})
		}
	}
	return table([]string{"", "with snapshots / without", "loop on a reflinked file / without", "the one / the other"}, lines)
}

func (r run) router() string {
	var lines [][]string
	for _, call := range []string{"CreateVolume-one-node", "CreateVolume-any-node", "GetCapacity-one-node", "GetCapacity-all", "ListVolumes-10", "ListVolumes-all"} {
		lines = append(lines, []string{call, r.latency("Router/nodes=10/" + call), r.latency("Router/nodes=1000/" + call)})
	}
	for _, m := range []struct{ what, call, unit string }{
		{"added to CreateVolume-one-node, p50 ms", "CreateVolume-one-node", "overhead-p50-ms"},
		{"resident memory at the start, MiB", "memory", "start-MiB"},
		{"resident memory, connected to all, MiB", "memory", "connected-MiB"},
	} {
		lines = append(lines, []string{m.what, r.value("Router/nodes=10/"+m.call, m.unit, 2), r.value("Router/nodes=1000/"+m.call, m.unit, 2)})
	}
	return table([]string{"ms: p50 / p99", "10 nodes", "1,000 nodes"}, lines)
}
