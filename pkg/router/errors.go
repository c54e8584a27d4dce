package router

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// at says in an error which node it comes from, and keeps its code.
func at(m member, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	return status.Error(s.Code(), fmt.Sprintf("node %s: %s", m.Segment, s.Message()))
}

// is reports whether a node answered with a code.
func is(err error, code codes.Code) bool { return status.Code(err) == code }
