// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package static predicts which files of an image a start will open, without running it: for images of which no start
// was traced yet. There are two methods.
//
// [Layers] is the N-Docker paper's (section 2.4): the steps of the image's history are read, and whole layers that hold
// the execution engine or the application are named.
//
// [Analyze] is finer, file by file: it follows what the kernel, the dynamic linker, shells and language runtimes would
// open when the image's command runs. It reads the image alone, runs nothing, and is bounded in every direction, for an
// image may be hostile.
//
// [Score] compares a prediction with what was traced.
package static

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/cpu"
)

// Root is a read-only view of an image's merged root filesystem. Names are those of package fs: relative to the root,
// with slashes, "." for the root itself. Links are followed by this package, with the image's root as "/": names handed
// to a Root hold no links but perhaps as the last element of Lstat and ReadLink. Directories opened must be
// [fs.ReadDirFile]; files that are [io.ReaderAt] are read in parts. [Dir] is a Root, as are fstest.MapFS and os.DirFS of
// a tree that nobody changes.
type Root interface {
	fs.ReadLinkFS
}

// Reason says why a file was predicted.
type Reason string

// The reasons.
const (
	Command     Reason = "command"     // a program that is executed
	Interpreter Reason = "interpreter" // named by #! of a script
	Loader      Reason = "loader"      // the ELF interpreter, or what it reads beside libraries
	Library     Reason = "library"     // DT_NEEDED, or loaded by name by an engine
	Startup     Reason = "startup"     // what an engine opens at every start
	Module      Reason = "module"      // imported, required or used by a script
	Script      Reason = "script"      // a program's text
	Config      Reason = "config"      // a configuration file, or what one includes
	Argument    Reason = "argument"    // a file named on a command line
	System      Reason = "system"      // name service, locale and time zone of the C library
)

// File is a regular file of the image that a start is expected to open.
type File struct {
	// Path is slash-separated, relative to the root of the image, without links: where the data is.
	Path   string
	Reason Reason
	// Rank counts from 1 in the expected order of first use.
	Rank int
	// Size in bytes.
	Size int64
}

// Options bound an analysis. Zero fields stand for the defaults. What takes more time than the caller has is ended by
// the context.
type Options struct {
	// MaxFiles is how many files are returned (20 000).
	MaxFiles int
	// MaxBytes is how much is read in all (256 MiB), MaxFileBytes how much of one file (8 MiB).
	MaxBytes, MaxFileBytes int64
	// MaxLookups is how many names are looked up in directories (500 000).
	MaxLookups int
	// MaxDepth is how deep programs start programs (8).
	MaxDepth int
	// HWCaps are the subdirectories of glibc-hwcaps that the processor can use, best first. nil: those of this machine.
	HWCaps []string
}

// ErrIncomplete is wrapped in the error of an analysis that reached a limit of [Options]. The files returned with it are
// those that were found first.
var ErrIncomplete = errors.New("static analysis is incomplete")

func (o Options) withDefaults() Options {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def64 := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.MaxFiles, 20_000)
	def64(&o.MaxBytes, 256<<20)
	def64(&o.MaxFileBytes, 8<<20)
	def(&o.MaxLookups, 500_000)
	def(&o.MaxDepth, 8)
	if o.HWCaps == nil {
		o.HWCaps = hostHWCaps()
	}
	return o
}

// hostHWCaps are the levels of the x86-64 psABI, as glibc names them. Other architectures' directories are rare and are
// not looked into.
func hostHWCaps() []string {
	x := cpu.X86
	v2 := x.HasSSE3 && x.HasSSSE3 && x.HasSSE41 && x.HasSSE42 && x.HasPOPCNT && x.HasCX16
	v3 := v2 && x.HasAVX2 && x.HasBMI1 && x.HasBMI2 && x.HasFMA
	v4 := v3 && x.HasAVX512F && x.HasAVX512BW && x.HasAVX512CD && x.HasAVX512DQ && x.HasAVX512VL
	caps := []string{}
	for _, level := range []struct {
		has  bool
		name string
	}{{v4, "x86-64-v4"}, {v3, "x86-64-v3"}, {v2, "x86-64-v2"}} {
		if level.has {
			caps = append(caps, level.name)
		}
	}
	return caps
}

// Analyze predicts the files that a start of the image with its own command opens, in the expected order. Names that
// lead nowhere are no errors: an image is free to name what it lacks. Errors are ErrIncomplete, with the files found so
// far, and the context's. It may be called from several goroutines when root may.
func Analyze(ctx context.Context, root Root, config v1.ImageConfig, options Options) ([]File, error) {
	a := newAnalysis(ctx, root, options)
	a.cwd = path.Join("/", config.WorkingDir)
	for _, e := range config.Env {
		if k, v, ok := strings.Cut(e, "="); ok {
			a.env[k] = v
		}
	}
	if a.env["PATH"] == "" {
		a.env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" // as runtimes do
	}
	if _, ok := a.env["HOME"]; !ok {
		a.env["HOME"] = "/root"
	}
	argv := append(append([]string{}, config.Entrypoint...), config.Cmd...)
	a.exec(argv, 0)
	if err := ctx.Err(); err != nil {
		return a.files, err
	}
	if a.limit != "" {
		return a.files, fmt.Errorf("analyze image: %w: %s", ErrIncomplete, a.limit)
	}
	return a.files, nil
}
