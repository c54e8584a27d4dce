package main

import (
	"fmt"
	"strconv"

	"k8s.io/apimachinery/pkg/api/resource"
)

// bytesPerSecond is a flag whose value is a quantity of Kubernetes, such as
// 200Mi.
type bytesPerSecond struct{ n *int64 }

func (b *bytesPerSecond) String() string {
	if b.n == nil {
		return "0"
	}
	return strconv.FormatInt(*b.n, 10)
}

func (b *bytesPerSecond) Set(text string) error {
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return fmt.Errorf("%w; give a number of bytes such as 200Mi", err)
	}
	n, ok := q.AsInt64()
	if !ok || n < 0 {
		return fmt.Errorf("%s is not a whole number of bytes that is not negative", text)
	}
	*b.n = n
	return nil
}

func (b *bytesPerSecond) Type() string { return "bytes" }
