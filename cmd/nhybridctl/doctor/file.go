// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Table is a TOML table of any layout.
type Table map[string]any

// at follows keys into tables.
func (t Table) at(keys ...string) Table {
	for _, k := range keys {
		next, _ := t[k].(map[string]any)
		t = next
	}
	return t
}

func (t Table) text(key string) string  { s, _ := t[key].(string); return s }
func (t Table) number(key string) int64 { n, _ := t[key].(int64); return n }
func (t Table) truth(key string) bool   { b, _ := t[key].(bool); return b }

func (t Table) texts(key string) []string {
	var all []string
	list, _ := t[key].([]any)
	for _, v := range list {
		if s, ok := v.(string); ok {
			all = append(all, s)
		}
	}
	return all
}

func (t Table) tables(key string) []Table {
	var all []Table
	list, _ := t[key].([]any)
	for _, v := range list {
		if m, ok := v.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

// Read gives containerd's configuration. Where containerd's program is at hand it is asked, since only it knows its own
// defaults and imports; without it the file and its imports are read. raw is the file by itself, for what containerd
// leaves out of its answer.
func Read(ctx context.Context, file, program string) (whole, raw Table, err error) {
	raw, err = parse(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	missing := err
	if path, lookErr := exec.LookPath(program); program != "" && lookErr == nil {
		args := []string{"config", "dump"}
		if missing == nil {
			args = append([]string{"--config", file}, args...)
		}
		out, err := exec.CommandContext(ctx, path, args...).Output()
		if err != nil {
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				err = fmt.Errorf("%w: %s", err, strings.Join(strings.Fields(string(exit.Stderr)), " "))
			}
			return nil, raw, fmt.Errorf("%s does not take %q: %w", program, file, err)
		}
		whole, err := decode(file, out)
		return whole, raw, err
	}
	if missing != nil {
		return nil, nil, missing
	}
	whole, err = parse(file) // a table of its own, since imports are merged into it
	if err == nil {
		err = imports(file, whole, map[string]bool{file: true})
	}
	return whole, raw, err
}

func parse(file string) (Table, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read containerd's configuration: %w", err)
	}
	return decode(file, data)
}

func decode(file string, data []byte) (Table, error) {
	var t map[string]any
	if err := toml.Unmarshal(data, &t); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			line, column := at.Position()
			return nil, fmt.Errorf("%s:%d:%d: %s", file, line, column, strings.TrimPrefix(at.Error(), "toml: "))
		}
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return t, nil
}

// imports merges the files that a configuration names: containerd takes them in order, each going before what came
// earlier, and globs relative to the directory of the file that names them.
func imports(file string, t Table, seen map[string]bool) error {
	for _, pattern := range t.texts("imports") {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(file), pattern)
		}
		files, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("%s: import %q: %w", file, pattern, err)
		}
		if len(files) == 0 && !strings.ContainsAny(pattern, "*?[") {
			return fmt.Errorf("%s: import %q: %w", file, pattern, os.ErrNotExist)
		}
		for _, f := range files {
			if seen[f] { // as containerd does: each file counts once, so that circles end
				continue
			}
			seen[f] = true
			more, err := parse(f)
			if err != nil {
				return err
			}
			if err := imports(f, more, seen); err != nil {
				return err
			}
			merge(t, more)
		}
	}
	return nil
}

func merge(into, from map[string]any) {
	for k, v := range from {
		old, ok := into[k].(map[string]any)
		fresh, both := v.(map[string]any)
		switch {
		case k == "imports" || k == "version":
		case ok && both:
			merge(old, fresh)
		default:
			into[k] = v
		}
	}
}
