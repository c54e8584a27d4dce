package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// bar is a ratio and its quartiles.
type bar struct {
	label       string
	value       float64
	least, most float64
}

// plot draws the data path: how fast volumes are against a bare loop device, and
// against a file of the pool's filesystem by itself.
func (r run) plot() string {
	var groups [][]bar
	var titles []string
	for _, g := range []struct{ title, benchmark, unit string }{
		{"block volume, thin / bare loop device", "BlockVolume", "thin/loop"},
		{"block volume, thick / bare loop device", "BlockVolume", "thick/loop"},
		{"block volume, thin / plain file", "BlockVolume", "thin/file"},
		{"bare loop device / plain file", "BlockVolume", "loop/file"},
		{"ext4 volume / ext4 on a bare loop device", "FilesystemVolume/ext4", "thin/loop"},
		{"XFS volume / XFS on a bare loop device", "FilesystemVolume/xfs", "thin/loop"},
	} {
		var bars []bar
		for _, row := range rows {
			name := g.benchmark + "/" + row
			if v, ok := r.get(name, g.unit); ok {
				least, _ := r.get(name, g.unit+"-q1")
				most, _ := r.get(name, g.unit+"-q3")
				bars = append(bars, bar{row, v, least, most})
			}
		}
		if len(bars) > 0 {
			groups, titles = append(groups, bars), append(titles, g.title)
		}
	}
	return draw(titles, groups)
}

// draw makes horizontal bars in groups, with a line at 1.
func draw(titles []string, groups [][]bar) string {
	const width, left, line, scale = 760, 190, 16, 400.0 // pixels; scale is that of a ratio of 1
	var body strings.Builder
	y := 10
	x := func(ratio float64) float64 { return left + math.Min(ratio, 1.35)*scale }
	for i, bars := range groups {
		y += line + 6
		fmt.Fprintf(&body, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", left, y-4, html.EscapeString(titles[i]))
		top := y
		for _, one := range bars {
			fmt.Fprintf(&body, `<text x="%d" y="%d" text-anchor="end">%s</text>`, left-6, y+12, html.EscapeString(one.label))
			fmt.Fprintf(&body, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="#4878a8"/>`, left, y+2, x(one.value)-left, line-4)
			fmt.Fprintf(&body, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#222"/>`, x(one.least), x(one.most), y+line/2, y+line/2)
			fmt.Fprintf(&body, `<text x="%.1f" y="%d">%.2f</text>`+"\n", x(math.Max(one.value, one.most))+4, y+12, one.value)
			y += line
		}
		fmt.Fprintf(&body, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#c03030" stroke-dasharray="3 2"/>`+"\n", x(1), x(1), top, y)
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n"+
		`<rect width="100%%" height="100%%" fill="white"/>`+"\n%s</svg>\n", width, y+12, body.String())
}
