package main

import (
	"context"
	"fmt"
	"path"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// render gives what the chart in a directory makes of values, by the name of the
// template below its templates directory. Values that the chart's schema does not
// allow are an error. The service is who installs it: Helm, or nobody.
func render(dir string, values map[string]any, service string) (map[string]string, error) {
	chart, err := loader.LoadDir(dir)
	if err != nil {
		return nil, err
	}
	release := common.ReleaseOptions{Name: "orlop", Namespace: namespace, IsInstall: true}
	rendering, err := util.ToRenderValues(chart, values, release, nil)
	if err != nil {
		return nil, err
	}
	rendering["Release"].(map[string]any)["Service"] = service //nolint:forcetypeassert // Helm's own
	files, err := engine.Engine{Strict: true}.RenderWithContext(context.Background(), chart, rendering)
	if err != nil {
		return nil, err
	}
	objects := make(map[string]string)
	for name, text := range files {
		_, name, found := strings.Cut(name, "/templates/")
		if !found {
			return nil, fmt.Errorf("%s is not below templates", name)
		}
		if path.Ext(name) == ".yaml" && strings.TrimSpace(text) != "" {
			objects[name] = text
		}
	}
	return objects, nil
}
