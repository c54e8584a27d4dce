package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	documents "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	"sigs.k8s.io/yaml"

	"github.com/orlop-csi/orlop/tests/e2e/cluster"
)

// The cluster, as its administrator.
var (
	admin   *rest.Config
	kube    *kubernetes.Clientset
	objects *dynamic.DynamicClient
	mapper  *restmapper.DeferredDiscoveryRESTMapper
)

func connect() (err error) {
	file := os.Getenv("KUBECONFIG")
	if file == "" {
		file = cluster.Kubeconfig
	}
	admin, err = clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return fmt.Errorf("no cluster (make cluster-up starts one): %w", err)
	}
	admin.QPS, admin.Burst = -1, -1 // tests are few, and measure
	admin.WarningHandler = rest.NoWarnings{}
	if kube, err = kubernetes.NewForConfig(admin); err != nil {
		return err
	}
	if objects, err = dynamic.NewForConfig(admin); err != nil {
		return err
	}
	mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(kube.Discovery()))
	return nil
}

// parse reads YAML documents, in which each ${key} of the pairs is replaced by
// the value that follows it.
func parse(t testing.TB, text string, pairs ...string) (all []*unstructured.Unstructured) {
	t.Helper()
	oldnew := []string{"${image}", *image}
	for i := 0; i < len(pairs); i += 2 {
		oldnew = append(oldnew, "${"+pairs[i]+"}", pairs[i+1])
	}
	text = strings.NewReplacer(oldnew...).Replace(text)
	decoder := documents.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := new(unstructured.Unstructured)
		err := decoder.Decode(o)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v in:\n%s", err, text)
		}
		if len(o.Object) > 0 {
			all = append(all, o)
		}
	}
}

// resource gives access to the objects of a resource, such as "pods" or
// "volumesnapshots.snapshot.storage.k8s.io". The namespace does not matter if
// they are not in any.
func resource(t testing.TB, name, namespace string) dynamic.ResourceInterface {
	t.Helper()
	gr := schema.ParseGroupResource(name)
	gvr, err := mapper.ResourceFor(gr.WithVersion(""))
	must(t, err)
	gvk, err := mapper.KindFor(gvr)
	must(t, err)
	mapping, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	must(t, err)
	if mapping.Scope.Name() != meta.RESTScopeNameNamespace {
		return objects.Resource(mapping.Resource)
	}
	return objects.Resource(mapping.Resource).Namespace(namespace)
}

// errGone is what a condition returns to say that an object should be there.
var errGone = errors.New("it is gone")

// await watches one object until a condition holds, and gives the object. The
// condition is asked again after each change; it gets nil while the object is
// not there. The test fails if the condition returns an error, or does not
// come true within the test's patience.
func await[T any](t testing.TB, in dynamic.ResourceInterface, name, what string, condition func(*T) (bool, error)) *T {
	t.Helper()
	return awaitFor(t, patience, in, name, what, condition)
}

func awaitFor[T any](t testing.TB, limit time.Duration, in dynamic.ResourceInterface, name, what string, condition func(*T) (bool, error)) *T {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var last *unstructured.Unstructured
	check := func(o *unstructured.Unstructured) bool {
		last = o
		var typed *T
		if o != nil {
			o.SetManagedFields(nil)
			typed = as[T](t, o)
		}
		done, err := condition(typed)
		if err != nil {
			t.Fatalf("waiting until %s is %s: %v", name, what, err)
		}
		return done
	}
	for ctx.Err() == nil {
		// A watch can end at any time; then it begins anew with what is there.
		if watchOne(ctx, in, name, check) {
			if last == nil {
				return nil
			}
			return as[T](t, last)
		}
	}
	if last == nil {
		t.Fatalf("%s is not %s after %s; it is not there", name, what, limit)
	}
	state, err := json.Marshal(last.Object["status"])
	t.Fatalf("%s is not %s after %s; its status is %s %v", name, what, limit, state, err)
	return nil
}

// watchOne calls check with each state of an object, and says whether check
// did so before the watch ended.
func watchOne(ctx context.Context, in dynamic.ResourceInterface, name string, check func(*unstructured.Unstructured) bool) bool {
	only := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
	list, err := in.List(ctx, only)
	if err != nil {
		pause(ctx)
		return false
	}
	var now *unstructured.Unstructured
	if len(list.Items) > 0 {
		now = &list.Items[0]
	}
	if check(now) {
		return true
	}
	only.ResourceVersion = list.GetResourceVersion()
	w, err := in.Watch(ctx, only)
	if err != nil {
		pause(ctx)
		return false
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		switch event.Type {
		case watch.Added, watch.Modified:
			if check(event.Object.(*unstructured.Unstructured)) {
				return true
			}
		case watch.Deleted:
			if check(nil) {
				return true
			}
		case watch.Bookmark:
		case watch.Error:
			return false
		}
	}
	return false
}

// pause waits a little before an attempt is repeated.
func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(200 * time.Millisecond):
	}
}

// eventually asks again and again until there is no error: for what cannot be
// watched. The test fails with the last error when its patience ends.
func eventually(t testing.TB, what string, attempt func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		err := attempt()
		if err == nil {
			return
		}
		if pause(ctx); ctx.Err() != nil {
			t.Fatalf("%s: not after %s: %v", what, patience, err)
		}
	}
}

// as reads an object as a typed one.
func as[T any](t testing.TB, o *unstructured.Unstructured) *T {
	t.Helper()
	data, err := o.MarshalJSON()
	must(t, err)
	typed := new(T)
	must(t, json.Unmarshal(data, typed))
	return typed
}

// create makes an object or changes it to what is given, as `kubectl apply
// --server-side` does.
func create(t testing.TB, o *unstructured.Unstructured, namespace string) (in dynamic.ResourceInterface, namespaced bool) {
	t.Helper()
	gvk := o.GroupVersionKind()
	mapping, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	must(t, err)
	in = objects.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		in, namespaced = objects.Resource(mapping.Resource).Namespace(namespace), true
	}
	_, err = in.Apply(context.Background(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "e2e", Force: true})
	if err != nil {
		t.Fatalf("applying %s %s: %v", o.GetKind(), o.GetName(), err)
	}
	return in, namespaced
}

// patch changes an object by a JSON merge patch, given as YAML or JSON.
func patch(t testing.TB, in dynamic.ResourceInterface, name, change string) {
	t.Helper()
	data, err := yaml.YAMLToJSON([]byte(change))
	must(t, err)
	_, err = in.Patch(context.Background(), name, types.MergePatchType, data, metav1.PatchOptions{FieldManager: "e2e"})
	must(t, err)
}

// remove asks for an object to be deleted; it is fine if it is gone.
func remove(t testing.TB, in dynamic.ResourceInterface, name string) {
	t.Helper()
	err := in.Delete(context.Background(), name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Errorf("deleting %s: %v", name, err)
	}
}

// run executes a command in a container and gives what it printed. An error
// has its standard error.
func run(namespace, pod, container string, command ...string) (string, error) {
	request := kube.CoreV1().RESTClient().Post().Namespace(namespace).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(admin, "GET", request.URL().String())
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var out, stderr bytes.Buffer
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &stderr})
	if err != nil {
		return out.String(), fmt.Errorf("%q in pod %s: %w: %s", command, pod, err, stderr.String())
	}
	return out.String(), nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	getNow    = metav1.GetOptions{}
	newestLog = &corev1.PodLogOptions{TailLines: new(int64(20))}
)
