// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package result

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
)

// Log is a file of runs, one JSON object a line, so that an interrupted benchmark goes on where it was.
type Log[T any] struct {
	mu   sync.Mutex
	file *os.File
}

// OpenLog opens or makes the file and returns the runs in it. A last line that was cut off by a crash is dropped; any
// other that cannot be read is an error, since a benchmark that goes on beside it would lose it.
func OpenLog[T any](path string) (*Log[T], []T, error) {
	fail := func(err error) (*Log[T], []T, error) {
		return nil, nil, fmt.Errorf("open log of runs %q: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fail(err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return fail(err)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	whole := bytes.LastIndexByte(b, '\n') + 1
	var runs []T
	line := 0
	for text := range bytes.Lines(b[:whole]) {
		line++
		var run T
		if err := json.Unmarshal(text, &run); err != nil {
			return fail(errors.Join(fmt.Errorf("line %d: %w; mend or remove the file", line, err), f.Close()))
		}
		runs = append(runs, run)
	}
	if err := f.Truncate(int64(whole)); err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	if _, err := f.Seek(int64(whole), io.SeekStart); err != nil {
		return fail(errors.Join(err, f.Close()))
	}
	return &Log[T]{file: f}, runs, nil
}

// Append adds a run; it is on the disk when Append returns.
func (l *Log[T]) Append(run T) error {
	b, err := json.Marshal(run)
	if err != nil {
		return fmt.Errorf("log run: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.file.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("log run: %w", err)
	}
	return l.file.Sync()
}

// Close closes the file.
func (l *Log[T]) Close() error { return l.file.Close() }
