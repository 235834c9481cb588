// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Treebench measures what the metadata of a layer costs: it makes a directory with the given number of files, captures
// it, writes the tree, and prints one line of JSON. Run it as a process of its own: peak_rss_bytes is that of the process.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/nhybrid/nhybrid/snapshotter/tree"
)

type result struct {
	Files        int     `json:"files"`
	CaptureS     float64 `json:"capture_s"`
	TreeS        float64 `json:"tree_s"`
	CaptureBytes int64   `json:"capture_bytes"`
	TreeBytes    int64   `json:"tree_bytes"`
	BytesPerFile float64 `json:"bytes_per_file"` // of the tree
	PeakRSSBytes int64   `json:"peak_rss_bytes"`
}

func main() {
	files := flag.Int("files", 10000, "number of files")
	dir := flag.String("dir", "", "where to make them (default: a temporary directory)")
	keep := flag.Bool("keep", false, "leave the files there, and use those that are there")
	flag.Parse()
	if err := run(*files, *dir, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "treebench:", err)
		os.Exit(1)
	}
}

func run(files int, dir string, keep bool) error {
	base, err := os.MkdirTemp(dir, "treebench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base)
	layer := filepath.Join(base, "layer")
	if keep && dir != "" {
		layer = filepath.Join(dir, "layer-"+strconv.Itoa(files))
	}
	if _, err := os.Stat(layer); err != nil {
		if err := generate(layer, files); err != nil {
			return err
		}
	}
	// What making the files took is not what is measured.
	runtime.GC()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return err
	}
	r := result{Files: files}
	capture, image := filepath.Join(base, "capture"), filepath.Join(base, "tree.erofs")
	if r.CaptureS, r.CaptureBytes, err = timed(capture, func(f *os.File) error {
		_, err := tree.Capture(context.Background(), layer, "1", nil, f)
		return err
	}); err != nil {
		return err
	}
	if r.TreeS, r.TreeBytes, err = timed(image, func(f *os.File) error {
		_, err := tree.Write(context.Background(), tree.Chain{capture}, f)
		return err
	}); err != nil {
		return err
	}
	r.BytesPerFile = float64(r.TreeBytes) / float64(files)
	if r.PeakRSSBytes, err = peakRSS(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// timed runs f on a new file and returns the seconds it took and the file's size.
func timed(path string, f func(*os.File) error) (seconds float64, size int64, err error) {
	out, err := os.Create(path)
	if err != nil {
		return 0, 0, err
	}
	defer out.Close()
	begin := time.Now()
	if err := f(out); err != nil {
		return 0, 0, err
	}
	seconds = time.Since(begin).Seconds()
	fi, err := out.Stat()
	if err != nil {
		return 0, 0, err
	}
	return seconds, fi.Size(), nil
}

// peakRSS is VmHWM of this process.
func peakRSS() (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(status) {
		var kib int64
		if n, _ := fmt.Sscanf(string(line), "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("no VmHWM in /proc/self/status")
}

// generate makes a layer with names and a shape like those of a distribution: some 20 files in a directory, four levels
// deep, one file in 50 a symlink.
func generate(root string, files int) error {
	for i, made := 0, 0; made < files; i++ {
		dir := filepath.Join(root, "usr", fmt.Sprintf("share-%02d", i%37), fmt.Sprintf("package-%d", i%1009), fmt.Sprintf("module-%d", i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for j := 0; j < 20 && made < files; j++ {
			name := filepath.Join(dir, fmt.Sprintf("file-%02d-%x.conf", j, (i*20+j)*2654435761%0xfffff))
			var err error
			if j == 19 && i%2 == 0 {
				err = os.Symlink("../file", name)
			} else {
				err = os.WriteFile(name, []byte("x"), 0o644)
			}
			if err != nil {
				return err
			}
			made++
		}
	}
	return nil
}
