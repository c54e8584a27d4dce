package main

import (
	"context"
	"fmt"
	"os"

	"github.com/orlop-csi/orlop/tests/e2e/cluster"
)

func main() {
	var err error
	switch os.Args[1] {
	case "up":
		err = cluster.Up(context.Background(), ".", os.Stderr)
	case "down":
		err = cluster.Down(context.Background(), os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}
