package request

import (
	"testing"

	"github.com/orlop-csi/orlop/pkg/pool"
)

func TestLimitsAreChangedByWhatIsGivenAndOnlyByThat(t *testing.T) {
	now := pool.Limits{ReadIOPS: 100, WriteBandwidth: 1 << 20}
	for _, c := range []struct {
		rule  string
		given map[string]string
		want  pool.Limits
	}{
		{"nothing", nil, now},
		{"another", map[string]string{"writeIOPS": "2k"}, pool.Limits{ReadIOPS: 100, WriteIOPS: 2000, WriteBandwidth: 1 << 20}},
		{"the same", map[string]string{"readIOPS": "7"}, pool.Limits{ReadIOPS: 7, WriteBandwidth: 1 << 20}},
		{"lifted", map[string]string{"writeBandwidth": ""}, pool.Limits{ReadIOPS: 100}},
		{"all", map[string]string{"readIOPS": "2", "writeIOPS": "1G", "readBandwidth": "4Ki", "writeBandwidth": "1Ti"}, pool.Limits{ReadIOPS: 2, WriteIOPS: 1_000_000_000, ReadBandwidth: 4096, WriteBandwidth: 1 << 40}},
		{"all lifted", map[string]string{"readIOPS": "", "writeIOPS": "", "readBandwidth": "", "writeBandwidth": ""}, pool.Limits{}},
		{"the ways to write a quantity", map[string]string{"readIOPS": "1e3", "writeIOPS": "0.5k", "readBandwidth": "1.5Mi"}, pool.Limits{ReadIOPS: 1000, WriteIOPS: 500, ReadBandwidth: 3 << 19, WriteBandwidth: 1 << 20}},
	} {
		if got, err := ChangeLimits(now, c.given); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", c.rule, got, err, c.want)
		}
	}
}

func TestALimitThatMakesNoSenseIsRefused(t *testing.T) {
	for _, c := range []struct{ key, value string }{
		{"iops", "100"},
		{"ReadIOPS", "100"},
		{"readIOPS ", "100"},
		{"", "100"},
		{"pool", "default"},
		{"csi.storage.k8s.io/pvc/name", "claim"},
		{"readIOPS", "0"},
		{"readIOPS", "1"},
		{"readIOPS", "-1"},
		{"readIOPS", "0.5"},
		{"readIOPS", "1500m"},
		{"readIOPS", "1000000001"},
		{"readIOPS", "9223372036854775807"},
		{"readIOPS", "1e30"},
		{"readIOPS", "max"},
		{"readIOPS", " "},
		{"readIOPS", "100 "},
		{"readIOPS", "100/s"},
		{"readIOPS", "0x10"},
		{"writeIOPS", "NaN"},
		{"readBandwidth", "4095"},
		{"readBandwidth", "0"},
		{"readBandwidth", "10MiB"},
		{"readBandwidth", "10Mi/s"},
		{"writeBandwidth", "1Ti1"},
		{"writeBandwidth", "1099511627777"},
		{"writeBandwidth", "-10Mi"},
	} {
		_, err := ChangeLimits(pool.Limits{}, map[string]string{"writeIOPS": "2", c.key: c.value})
		mustBe(t, c.key+"="+c.value, err, pool.ErrInvalid, "mutable parameter", c.key)
	}
}
