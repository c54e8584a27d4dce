// Package cluster is what the driver knows of Kubernetes, and all that it says
// to the API server: which nodes there are, the authority whose certificates
// router and nodes show each other, and which volumes the cluster still names.
//
// It knows nothing of pools and disks. It uses the client library's REST client
// and informers with the few API groups that it needs, and not the generated
// clients: these bring all groups along, which takes 12 MiB of memory in each
// process, on every node, whether they are used or not.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	certificates "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	storage "k8s.io/api/storage/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// Client talks to the API server, one REST client for each API group.
type Client struct {
	core, certificates, discovery, storage rest.Interface
}

// Connect prepares a client; it calls nobody yet. Without a kubeconfig file it
// is that of the pod that the process runs in. The user agent tells the API
// server who calls.
func Connect(kubeconfig, userAgent string) (*Client, error) {
	config, err := load(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.UserAgent = userAgent
	config.QPS, config.Burst = 50, 100 // the library's 5 and 10 are for a person at a keyboard
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	c := &Client{}
	for _, group := range []struct {
		client  *rest.Interface
		version schema.GroupVersion
		types   func(*runtime.Scheme) error
	}{
		{&c.core, core.SchemeGroupVersion, core.AddToScheme},
		{&c.certificates, certificates.SchemeGroupVersion, certificates.AddToScheme},
		{&c.discovery, discovery.SchemeGroupVersion, discovery.AddToScheme},
		{&c.storage, storage.SchemeGroupVersion, storage.AddToScheme},
	} {
		if err := group.types(scheme); err != nil {
			return nil, err
		}
		own := rest.CopyConfig(config)
		own.GroupVersion = &group.version
		own.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
		own.APIPath = "/apis"
		if group.version.Group == "" {
			own.APIPath = "/api"
		}
		if *group.client, err = rest.RESTClientForConfigAndClient(own, transport); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func load(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("this is no pod of a Kubernetes cluster; name a kubeconfig file")
	}
	return config, err
}

// informer keeps a copy of the objects of a kind, in one namespace or, if that
// is empty, in all. What slim takes out of them is not kept.
func informer[T runtime.Object](client rest.Interface, resource, namespace string, kind T, slim func(T), selected func(*meta.ListOptions)) (cache.SharedIndexInformer, error) {
	if selected == nil {
		selected = func(*meta.ListOptions) {}
	}
	source := cache.NewFilteredListWatchFromClient(client, resource, namespace, selected)
	i := cache.NewSharedIndexInformerWithOptions(source, kind, cache.SharedIndexInformerOptions{ObjectDescription: resource})
	err := i.SetTransform(func(object any) (any, error) {
		if o, ok := object.(meta.Object); ok {
			o.SetManagedFields(nil)
		}
		if o, ok := object.(T); ok && slim != nil {
			slim(o)
		}
		return object, nil
	})
	return i, err
}

// named selects the one object of a name.
func named(name string) func(*meta.ListOptions) {
	return func(o *meta.ListOptions) { o.FieldSelector = "metadata.name=" + name }
}

// onChange calls changed with each object that comes, changes or goes, one after
// the other.
func onChange[T runtime.Object](i cache.SharedIndexInformer, changed func(T)) error {
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { call(o, changed) },
		UpdateFunc: func(_, o any) { call(o, changed) },
		DeleteFunc: func(o any) {
			if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = gone.Obj
			}
			call(o, changed)
		},
	})
	return err
}

func call[T runtime.Object](object any, changed func(T)) {
	if o, ok := object.(T); ok {
		changed(o)
	}
}

// namespaceFile is where a pod finds the name of its namespace.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// Namespace is that of the pod that the process runs in.
func Namespace() (string, error) {
	name, err := os.ReadFile(namespaceFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("this is no pod of a Kubernetes cluster; give the namespace")
	}
	return strings.TrimSpace(string(name)), err
}

// Report tells what was done or has failed in the background, for the log: a
// message, an error or nil, and keys and values. Nothing in it is secret.
type Report func(message string, err error, about ...any)

// run runs informers and work until ctx is done.
func run(ctx context.Context, work func(context.Context) error, informers ...cache.SharedIndexInformer) error {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{}, len(informers))
	for _, i := range informers {
		go func() {
			i.RunWithContext(ctx)
			ended <- struct{}{}
		}()
	}
	err := work(ctx)
	cancel()
	for range informers {
		<-ended
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

var errNotYet = errors.New("the API server has not been heard yet")

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
