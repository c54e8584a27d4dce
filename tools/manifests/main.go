// Command manifests makes the base of deploy/kubernetes from the chart in
// deploy/helm/orlop: what the chart renders by default, one file for each
// template, with the kustomization.yaml that lists them. It is run by make update.
package main

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const (
	// namespace is where deploy/kubernetes installs the driver.
	namespace = "orlop-system"

	header = "# Generated from deploy/helm/orlop by make update; do not edit.\n"
)

func main() {
	chart := flag.String("chart", "../../deploy/helm/orlop", "`directory` of the chart")
	out := flag.String("out", "../../deploy/kubernetes/base", "`directory` to write")
	flag.Parse()
	if err := generate(*chart, *out); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// generate writes the base, and removes what it no longer has.
func generate(chart, out string) error {
	files, err := base(chart)
	if err != nil {
		return err
	}
	for name, text := range files {
		file := filepath.Join(out, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	old, err := os.OpenRoot(out)
	if err != nil {
		return err
	}
	defer old.Close()
	return fs.WalkDir(old.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if _, found := files[name]; found {
			return nil
		}
		return old.Remove(name)
	})
}

// base gives the files of the base by their names in it.
func base(chart string) (map[string]string, error) {
	rendered, err := render(chart, nil, "")
	if err != nil {
		return nil, err
	}
	files := map[string]string{"namespace.yaml": header + namespaceObject}
	for name, text := range rendered {
		files[name] = header + tidy(text)
	}
	// A directory is a kustomization of its own, so that an overlay can use it a
	// second time.
	resources := make(map[string][]string)
	for name := range files {
		dir := path.Dir(name)
		resources[dir] = append(resources[dir], path.Base(name))
		if dir != "." && !slices.Contains(resources["."], dir) {
			resources["."] = append(resources["."], dir)
		}
	}
	for dir, names := range resources {
		slices.Sort(names)
		files[path.Join(dir, "kustomization.yaml")] = header + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n- " +
			strings.Join(names, "\n- ") + "\n"
	}
	return files, nil
}

// namespaceObject is what a chart leaves to helm install --create-namespace. The
// node pods are privileged.
const namespaceObject = `apiVersion: v1
kind: Namespace
metadata:
  name: ` + namespace + `
  labels:
    app.kubernetes.io/name: orlop
    pod-security.kubernetes.io/enforce: privileged
`

// tidy removes what templates leave behind: separators at the beginning, spaces
// at the ends of lines, and lines without anything else.
func tidy(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \n")
		if line != "" && (line != "---" || len(lines) > 0) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n") + "\n"
}
