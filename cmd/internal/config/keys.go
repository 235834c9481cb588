// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

const envPrefix = "NHYBRID_"

// key is one value of a configuration, by its dotted name.
type key struct {
	name  string
	value reflect.Value
}

// keys lists every value of c in the order of the file; setting one changes c.
func (c *Config) keys() []key { return fields("", reflect.ValueOf(c).Elem()) }

func fields(prefix string, v reflect.Value) []key {
	var all []key
	for i := range v.NumField() {
		name := prefix + v.Type().Field(i).Tag.Get("toml")
		f := v.Field(i)
		_, text := f.Addr().Interface().(encoding.TextUnmarshaler)
		if f.Kind() == reflect.Struct && !text {
			all = append(all, fields(name+".", f)...)
			continue
		}
		all = append(all, key{name, f})
	}
	return all
}

func find(all []key, name string) (key, bool) {
	for _, k := range all {
		if k.name == name {
			return k, true
		}
	}
	return key{}, false
}

func (k key) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))
}

func (k key) set(s string) error {
	if t, ok := k.value.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return t.UnmarshalText([]byte(s))
	}
	switch k.value.Kind() {
	case reflect.String:
		k.value.SetString(s)
	case reflect.Int:
		n, err := strconv.Atoi(s)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", s)
		}
		k.value.SetInt(int64(n))
	case reflect.Bool:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return fmt.Errorf("%q is not true or false", s)
		}
		k.value.SetBool(b)
	default:
		return fmt.Errorf("cannot be set from text")
	}
	return nil
}

// suggest names the key that name was perhaps meant to be: one with the same last part, or few letters away.
func suggest(name string, all []key) string {
	last := name[strings.LastIndexByte(name, '.')+1:]
	best, least := "", len(name)/2+1
	for _, k := range all {
		if k.name[strings.LastIndexByte(k.name, '.')+1:] == last {
			return fmt.Sprintf("; did you mean %q?", k.name)
		}
		if d := distance(name, k.name); d < least {
			best, least = k.name, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance is Levenshtein's: insertions, deletions and substitutions from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
