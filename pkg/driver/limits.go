package driver

import (
	"fmt"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/orlop-csi/orlop/pkg/pool"
)

// The size limits of fields, in bytes (CSI spec v1.13.0, "Size Limits").
const (
	maxString = 128
	maxMap    = 4 << 10
	maxNodeID = 256 // NodeGetInfoResponse.node_id overrides the general limit
	// The paths override it too, and ask for what the system can do.
	maxPath = unix.PathMax - 1 // without the final NUL
)

// bannedInNames holds the control characters that the name of a volume or a
// snapshot must not have (CSI spec v1.13.0, CreateVolumeRequest.name).
var bannedInNames = &unicode.RangeTable{
	R16: []unicode.Range16{
		{Lo: 0x00, Hi: 0x08, Stride: 1},
		{Lo: 0x0b, Hi: 0x0c, Stride: 1},
		{Lo: 0x0e, Hi: 0x1f, Stride: 1},
		{Lo: 0x7f, Hi: 0x9f, Stride: 1},
	},
	LatinOffset: 4,
}

// checkLimits refuses a request of which a field is larger than the
// specification allows, or a name holds what it bans. That text is UTF-8 has
// been seen to by the protobuf decoder.
//
// Two kinds of field are left to the services, because the specification wants
// another answer than INVALID_ARGUMENT for one that makes no sense: IDs (OK to
// Delete, NOT_FOUND to the rest, nothing to List), and starting tokens
// (ABORTED).
func checkLimits(request proto.Message) error {
	var err error
	walk("", request.ProtoReflect(), func(where string, field protoreflect.FieldDescriptor, value protoreflect.Value) {
		if err == nil {
			err = checkField(where, field, value)
		}
	})
	return err
}

func checkField(where string, field protoreflect.FieldDescriptor, value protoreflect.Value) error {
	name := string(field.Name())
	switch {
	case field.IsMap():
		size := 0
		value.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			size += len(k.String()) + len(v.String())
			return true
		})
		return atMost(where, size, maxMap)
	case name == "mount_flags": // limited as a whole: VolumeCapability.MountVolume
		size := 0
		for i := range value.List().Len() {
			size += len(value.List().Get(i).String())
		}
		return atMost(where, size, maxMap)
	case field.Kind() != protoreflect.StringKind, name == "starting_token":
		return nil
	case name == "node_id":
		return atMost(where, len(value.String()), maxNodeID)
	case strings.HasSuffix(name, "_id"), strings.HasSuffix(name, "_ids"):
		return nil
	case field.IsList():
		for i := range value.List().Len() {
			if err := atMost(fmt.Sprintf("%s[%d]", where, i), len(value.List().Get(i).String()), maxString); err != nil {
				return err
			}
		}
		return nil
	case strings.HasSuffix(name, "_path"):
		return atMost(where, len(value.String()), maxPath)
	}
	if err := atMost(where, len(value.String()), maxString); err != nil {
		return err
	}
	if name == "name" && strings.ContainsFunc(value.String(), func(r rune) bool { return unicode.Is(bannedInNames, r) }) {
		return pool.Errorf(pool.ErrInvalid, "%s %q holds a control character", where, value.String())
	}
	return nil
}

func atMost(where string, size, limit int) error {
	if size > limit {
		return pool.Errorf(pool.ErrInvalid, "%s has %d bytes; the limit is %d", where, size, limit)
	}
	return nil
}

// walk visits the fields of a message that are set, and those of the messages
// in it, with their path as in volume_capabilities[0].mount.fs_type.
func walk(prefix string, m protoreflect.Message, visit func(where string, field protoreflect.FieldDescriptor, value protoreflect.Value)) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		where := prefix + string(field.Name())
		visit(where, field, value)
		switch {
		case field.Kind() != protoreflect.MessageKind || field.IsMap():
		case field.IsList():
			for i := range value.List().Len() {
				walk(fmt.Sprintf("%s[%d].", where, i), value.List().Get(i).Message(), visit)
			}
		default:
			walk(where+".", value.Message(), visit)
		}
		return true
	})
}
