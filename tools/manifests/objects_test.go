package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const (
	chartDir   = "../../deploy/helm/orlop"
	kubernetes = "../../deploy/kubernetes"
)

// decoder knows the types of the API, and refuses a field that a type has not, or
// that is there twice.
var decoder = func() runtime.Decoder {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		clientgoscheme.AddToScheme, snapshotv1.AddToScheme, groupsnapshotv1.AddToScheme, monitoringv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
}()

// objects are API objects by kind and name.
type objects map[string]client.Object

// decode reads the objects of YAML documents.
func decode(t *testing.T, texts ...string) objects {
	t.Helper()
	all := make(objects)
	for _, text := range texts {
		reader := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
		for {
			document, err := reader.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if strings.TrimSpace(string(document)) == "" {
				continue
			}
			decoded, kind, err := decoder.Decode(document, nil, nil)
			if err != nil {
				t.Fatalf("%v:\n%s", err, document)
			}
			object := decoded.(client.Object)
			name := kind.Kind + "/" + object.GetName()
			if _, found := all[name]; found {
				t.Fatalf("%s is there twice", name)
			}
			all[name] = object
		}
	}
	return all
}

// chartObjects gives what the chart makes of values as helm install does.
func chartObjects(t *testing.T, values map[string]any) objects {
	t.Helper()
	rendered, err := render(chartDir, values, "Helm")
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, text := range rendered {
		texts = append(texts, text)
	}
	return decode(t, texts...)
}

// kustomizeObjects gives what kubectl apply -k applies.
func kustomizeObjects(t *testing.T, dir string) objects {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := resources.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, string(text))
}

func valuesFrom(t *testing.T, file string) map[string]any {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	values, err := loader.LoadValues(f)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

func parseValues(t *testing.T, text string) map[string]any {
	t.Helper()
	values := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &values); err != nil {
		t.Fatal(err)
	}
	return values
}

// get gives the object of a type.
func get[T client.Object](t *testing.T, all objects, name string) T {
	t.Helper()
	object, found := all[name].(T)
	if !found {
		t.Fatalf("there is no %s", name)
	}
	return object
}

// podSpecs gives the pods of all workloads by the workload's name.
func podSpecs(all objects) map[string]corev1.PodSpec {
	specs := make(map[string]corev1.PodSpec)
	for name, object := range all {
		switch workload := object.(type) {
		case *appsv1.Deployment:
			specs[name] = workload.Spec.Template.Spec
		case *appsv1.DaemonSet:
			specs[name] = workload.Spec.Template.Spec
		}
	}
	return specs
}
