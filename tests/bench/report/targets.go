package main

import (
	"fmt"
	"math"
)

// aim is one thing that is aimed at: a figure, and whether it is as wanted.
type aim struct {
	what, target string
	measure      func(r run) (text string, met, known bool)
}

// atMost and atLeast are aims of one figure.
func atMost(limit float64, digits int, figure func(r run) (float64, bool)) func(run) (string, bool, bool) {
	return func(r run) (string, bool, bool) {
		v, ok := figure(r)
		return fmt.Sprintf("%.*f", digits, v), v <= limit, ok
	}
}

func atLeast(limit float64, digits int, figure func(r run) (float64, bool)) func(run) (string, bool, bool) {
	return func(r run) (string, bool, bool) {
		v, ok := figure(r)
		return fmt.Sprintf("%.*f", digits, v), v >= limit, ok
	}
}

func metric(name, unit string) func(run) (float64, bool) {
	return func(r run) (float64, bool) { return r.get(name, unit) }
}

// worst is the least of a figure over some rows of the data path.
func worst(over []string, figures ...[2]string) func(run) (float64, bool) {
	return func(r run) (float64, bool) {
		least, known := math.Inf(1), false
		for _, row := range over {
			for _, f := range figures {
				if v, ok := r.get(f[0]+"/"+row, f[1]); ok {
					least, known = min(least, v), true
				}
			}
		}
		return least, known
	}
}

// againstLoop is how volumes do against a bare loop device: in the worst row, in
// the mean of all, and in how many rows even the upper quartile is below the limit.
// How another bare loop device does, which is the same thing twice, stands beside.
func againstLoop(limit float64, volumes, again [][2]string) func(run) (string, bool, bool) {
	return func(r run) (text string, met, known bool) {
		least, ok := worst(rows, volumes...)(r)
		same, also := worst(rows, again...)(r)
		var logs, n, below float64
		for _, row := range rows {
			for _, f := range volumes {
				if v, ok := r.get(f[0]+"/"+row, f[1]); ok {
					logs, n = logs+math.Log(v), n+1
				}
				if q3, ok := r.get(f[0]+"/"+row, f[1]+"-q3"); ok && q3 < limit {
					below++
				}
			}
		}
		mean := math.Exp(logs / n)
		text = fmt.Sprintf("%.2f (a second loop device: %.2f); the mean of %.0f rows is %.2f, clearly below are %.0f", least, same, n, mean, below)
		return text, least >= min(limit, same), ok && also
	}
}

// againstFile is how a block volume does in the random rows against a file of the
// pool's filesystem by itself, and how a bare loop device does.
func againstFile(r run) (text string, met, known bool) {
	volume, ok := worst(rows[:4], [2]string{"BlockVolume", "thin/file"})(r)
	loop, also := worst(rows[:4], [2]string{"BlockVolume", "loop/file"})(r)
	return fmt.Sprintf("%.2f (a bare loop device: %.2f)", volume, loop), volume >= min(0.85, 0.97*loop), ok && also
}

// staged is how a staging does against the same by hand, and how it does against
// that and what the driver's records take of the disk.
func staged(r run) (text string, met, known bool) {
	const name = "Stage/ext4/size=1GiB"
	plain, ok := r.get(name, "of-by-hand")
	recorded, also := r.get(name, "of-by-hand-recorded")
	return fmt.Sprintf("%.2f (with the syncs of two records by hand, too: %.2f)", plain, recorded), plain <= 1 || recorded <= 1, ok && also
}

// call is the p50 of a call alone, beside so many volumes.
func call(r run, volumes, name string) (float64, bool) {
	return r.get("Call/volumes="+volumes+"/"+name+"/inflight=1", "p50-ms")
}

// beyondFsync is the largest p50 of the quick calls less so many fsyncs as they
// make: the files, their directory, and the one that it is renamed to.
func beyondFsync(r run) (float64, bool) {
	sync, known := call(r, "1000", "fsync")
	most := 0.0
	for name, syncs := range map[string]float64{"CreateVolume": 2, "DeleteVolume": 0.5, "CreateSnapshot": 2, "GetCapacity": 0} {
		v, ok := call(r, "1000", name)
		most, known = max(most, v-syncs*sync), known && ok
	}
	return most, known
}

// growth is the largest ratio of the p50 of a call beside 10,000 volumes and
// beside 10.
func growth(r run) (text string, met, known bool) {
	most, which := 0.0, ""
	for _, name := range calls {
		if ratio, ok := r.get("ManyVolumes/"+name, "many/few"); ok && name != "fsync" && ratio > most {
			most, which = ratio, name
		}
	}
	return fmt.Sprintf("%.2f (%s)", most, which), most <= 1.5, which != ""
}

// scaling is what 32 in flight get done against one, for CreateVolume, for the same
// files made by hand, and for syncs alone.
func scaling(r run) (text string, met, known bool) {
	create, ok := r.get("InFlight", "CreateVolume-32/1")
	sync, also := r.get("InFlight", "fsync-32/1")
	hand, too := r.get("InFlight", "by-hand-32/1")
	return fmt.Sprintf("%.1f (the same files by hand: %.1f; fsync alone: %.1f)", create, hand, sync), create >= 4 || create >= 0.8*sync, ok && also && too
}

var aims = []aim{
	{"block volume / bare loop device, the worst row", "≥ 0.97, or as a second bare loop device", againstLoop(0.97,
		[][2]string{{"BlockVolume", "thin/loop"}, {"BlockVolume", "thick/loop"}},
		[][2]string{{"BlockVolume", "loop-again/loop"}})},
	{"filesystem volume / the same filesystem on a bare loop device, the worst row", "≥ 0.97, or as a second bare loop device", againstLoop(0.97,
		[][2]string{{"FilesystemVolume/ext4", "thin/loop"}, {"FilesystemVolume/xfs", "thin/loop"}},
		[][2]string{{"FilesystemVolume/ext4", "loop-again/loop"}, {"FilesystemVolume/xfs", "loop-again/loop"}})},
	{"block volume / plain file, 1 MiB sequential", "≥ 0.95", atLeast(0.95, 2, worst([]string{"1M-read", "1M-write"}, [2]string{"BlockVolume", "thin/file"}))},
	{"block volume / plain file, 4 KiB random", "≥ 0.85, or as a bare loop device", againstFile},
	{"CreateVolume, DeleteVolume, CreateSnapshot, GetCapacity: p50 without what fsync takes, ms", "≤ 2", atMost(2, 2, beyondFsync)},
	{"staging an empty ext4 / mkfs and mount by hand, 1 GiB", "≤ 1.0, or bound by the records' syncs", staged},
	{"the same, 1 TiB", "≤ 0.8", atMost(0.8, 2, metric("Stage/ext4/size=1024GiB", "of-by-hand"))},
	{"disk that the empty ext4 takes / by default, 1 TiB", "≤ 0.05", atMost(0.05, 3, metric("Stage/ext4/size=1024GiB", "disk-of-by-hand"))},
	{"CreateVolume, 32 in flight / 1 in flight", "≥ 4, or bound by fsync", scaling},
	{"10,000 volumes / 10: p50 of the call that it concerns most", "≤ 1.5", growth},
	{"start with 10,000 volumes, ms", "≤ 1000", atMost(1000, 0, metric("Footprint/volumes=10000/process", "start-ms"))},
	{"idle memory with 1,000 volumes, MiB", "≤ 40", atMost(40, 1, metric("Footprint/volumes=1000/process", "idle-MiB"))},
	{"writer's wait for a snapshot / FICLONE alone, block", "≤ 1.2", atMost(1.2, 2, metric("SnapshotOfLiveVolume/block/pause", "of-ficlone"))},
	{"the same, ext4", "≤ 1.2", atMost(1.2, 2, metric("SnapshotOfLiveVolume/ext4/pause", "of-ficlone"))},
	{"the same, XFS", "≤ 1.2", atMost(1.2, 2, metric("SnapshotOfLiveVolume/xfs/pause", "of-ficlone"))},
	{"router before 1,000 nodes: added to CreateVolume, p50 ms", "≤ 1", atMost(1, 2, metric("Router/nodes=1000/CreateVolume-one-node", "overhead-p50-ms"))},
}

// targets tells of what is aimed at what was measured.
func (r run) targets() string {
	var lines [][]string
	for _, a := range aims {
		text, met, known := a.measure(r)
		switch {
		case !known:
			lines = append(lines, []string{a.what, a.target, "not measured", ""})
		case met:
			lines = append(lines, []string{a.what, a.target, text, "yes"})
		default:
			lines = append(lines, []string{a.what, a.target, text, "no"})
		}
	}
	return table([]string{"", "target", "measured", "met?"}, lines)
}
