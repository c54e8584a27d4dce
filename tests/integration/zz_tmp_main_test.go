//go:build integration

package integration

import (
	"testing"

	"github.com/orlop-csi/orlop/tests/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
