// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"sort"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif/profile"
)

// JSON writes a message for scripts: every field under its name in control.proto, zero values included, sizes as
// numbers, times as RFC 3339. (protojson writes 64-bit numbers as strings, which jq cannot add up.) Absent messages,
// times and optional numbers are null. Bytes are paths and stand as in profiles: {"base64": "…"} where they are not UTF-8.
func JSON(m proto.Message) ([]byte, error) {
	var b bytes.Buffer
	if err := appendMessage(&b, m.ProtoReflect()); err != nil {
		return nil, fmt.Errorf("write %s as JSON: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return b.Bytes(), nil
}

func appendMessage(b *bytes.Buffer, m protoreflect.Message) error {
	if t, ok := m.Interface().(*timestamppb.Timestamp); ok {
		return appendValue(b, t.AsTime().Format(time.RFC3339Nano))
	}
	fields := m.Descriptor().Fields()
	b.WriteByte('{')
	for i := range fields.Len() {
		if i > 0 {
			b.WriteByte(',')
		}
		f := fields.Get(i)
		if err := appendValue(b, string(f.Name())); err != nil {
			return err
		}
		b.WriteByte(':')
		if err := appendField(b, m, f); err != nil {
			return err
		}
	}
	b.WriteByte('}')
	return nil
}

func appendField(b *bytes.Buffer, m protoreflect.Message, f protoreflect.FieldDescriptor) error {
	v := m.Get(f)
	switch {
	case f.IsMap():
		keys := []string{}
		v.Map().Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool { keys = append(keys, k.String()); return true })
		sort.Strings(keys)
		b.WriteByte('{')
		for i, k := range keys {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := appendValue(b, k); err != nil {
				return err
			}
			b.WriteByte(':')
			if err := appendAny(b, v.Map().Get(protoreflect.ValueOfString(k).MapKey())); err != nil {
				return err
			}
		}
		b.WriteByte('}')
		return nil
	case f.IsList():
		b.WriteByte('[')
		for i := range v.List().Len() {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := appendAny(b, v.List().Get(i)); err != nil {
				return err
			}
		}
		b.WriteByte(']')
		return nil
	case f.HasPresence() && !m.Has(f):
		b.WriteString("null")
		return nil
	}
	return appendAny(b, v)
}

func appendAny(b *bytes.Buffer, v protoreflect.Value) error {
	switch x := v.Interface().(type) {
	case protoreflect.Message:
		return appendMessage(b, x)
	case []byte:
		if utf8.Valid(x) {
			return appendValue(b, string(x))
		}
		return appendValue(b, profile.Path(x))
	case float64:
		if math.IsNaN(x) || math.IsInf(x, 0) { // JSON has neither
			return appendValue(b, nil)
		}
	}
	return appendValue(b, v.Interface())
}

func appendValue(b *bytes.Buffer, v any) error {
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	b.Truncate(b.Len() - 1) // the encoder's newline
	return nil
}
