package request

import (
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// Health is the CSI form of what is wrong with a volume. A pair of status and
// reason stands in it once (CSI spec v1.13.0, VolumeHealthEntry).
func Health(volumeID string, conditions []pool.Condition) *csi.VolumeHealth {
	health := &csi.VolumeHealth{VolumeId: volumeID}
	for _, c := range once(conditions) {
		health.HealthStatuses = append(health.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: map[pool.Severity]csi.VolumeHealthErrorType{
				pool.Degraded:     csi.VolumeHealthErrorType_DEGRADED,
				pool.Inaccessible: csi.VolumeHealthErrorType_INACCESSIBLE,
				pool.DataLoss:     csi.VolumeHealthErrorType_DATA_LOSS,
			}[c.Severity],
			Reason:  c.Reason,
			Message: Brief(c.Message),
		})
	}
	return health
}

// StorageHealth is the CSI form of what is wrong with the pools of a node.
func StorageHealth(conditions []pool.Condition) []*csi.NodeGetStorageHealthResponse_StorageBackendHealth {
	var health []*csi.NodeGetStorageHealthResponse_StorageBackendHealth
	for _, c := range once(conditions) {
		status := csi.StorageHealthErrorType_STORAGE_UNREACHABLE
		if c.Severity == pool.Degraded {
			status = csi.StorageHealthErrorType_STORAGE_DEGRADED
		}
		health = append(health, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: status, Reason: c.Reason, Message: Brief(c.Message),
		})
	}
	return health
}

// maxString is the size limit of a string field in bytes (CSI spec v1.13.0,
// "Size Limits"). It holds for what a plugin sends, too.
const maxString = 128

// Brief cuts a text so that it fits a string field.
func Brief(s string) string {
	if len(s) <= maxString {
		return s
	}
	const cut = "…"
	return strings.ToValidUTF8(s[:maxString-len(cut)], "") + cut
}

// once joins the messages of the conditions that have severity and reason in
// common.
func once(conditions []pool.Condition) []pool.Condition {
	type pair struct {
		severity pool.Severity
		reason   string
	}
	at := map[pair]int{}
	var merged []pool.Condition
	for _, c := range conditions {
		key := pair{c.Severity, c.Reason}
		if i, ok := at[key]; ok {
			merged[i].Message += "; " + c.Message
			continue
		}
		at[key] = len(merged)
		merged = append(merged, c)
	}
	return merged
}
