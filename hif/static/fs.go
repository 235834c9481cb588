// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// analysis is the state of one call of Analyze. Its methods never fail: what cannot be read is not there.
type analysis struct {
	ctx     context.Context
	root    Root
	options Options
	env     map[string]string
	cwd     string

	files   []File
	seen    map[string]int // index in files + 1
	nodes   map[string]node
	lists   map[string][]string
	lookups int
	read    int64
	text    int64
	limit   string // the first limit reached

	running map[string]bool // command lines that were followed
	elf     elfState
	engines engines
}

// node is a name of the image, as Lstat tells it.
type node struct {
	mode fs.FileMode
	size int64
	link string
	ok   bool
}

func newAnalysis(ctx context.Context, root Root, options Options) *analysis {
	return &analysis{
		ctx: ctx, root: root, options: options.withDefaults(), env: map[string]string{}, cwd: "/",
		seen: map[string]int{}, nodes: map[string]node{}, lists: map[string][]string{}, running: map[string]bool{},
	}
}

// stopped says if the analysis is to end.
func (a *analysis) stopped() bool {
	return a.limit != "" || a.ctx.Err() != nil
}

func (a *analysis) stop(limit string) {
	if a.limit == "" {
		a.limit = limit
	}
}

// spend counts text that is parsed: scripts can be made to be read over and over, by each other or within themselves. It
// says if there is some left.
func (a *analysis) spend(n int) bool {
	const most = 64 << 20
	if a.text += int64(n) + 64; a.text > most {
		a.stop("too much text parsed")
	}
	return !a.stopped()
}

// What a runtime mounts over the image's own.
var mounted = []string{"etc/hosts", "etc/hostname", "etc/resolv.conf"}

func isMounted(name string) bool {
	first, _, _ := strings.Cut(name, "/")
	return first == "proc" || first == "sys" || first == "dev" || slices.Contains(mounted, name)
}

// add predicts a file, by a path absolute or relative to the working directory. ok: it is a regular file.
func (a *analysis) add(name string, why Reason) (real string, ok bool) {
	real, n := a.resolve(name)
	if !n.ok || !n.mode.IsRegular() {
		return "", false
	}
	if a.seen[real] != 0 || isMounted(real) {
		return real, true
	}
	if len(a.files) >= a.options.MaxFiles {
		a.stop("too many files")
		return real, true
	}
	a.files = append(a.files, File{Path: real, Reason: why, Rank: len(a.files) + 1, Size: n.size})
	a.seen[real] = len(a.files)
	return real, true
}

// maxLinks is the kernel's limit of links followed in one path (MAXSYMLINKS).
const maxLinks = 40

// resolve follows links with the image's root as "/". real has no leading slash; node.ok says if it is there.
func (a *analysis) resolve(name string) (real string, n node) {
	const maxName = 4096
	if name == "" || len(name) > maxName || strings.ContainsRune(name, 0) {
		return "", node{}
	}
	if name[0] != '/' {
		name = a.cwd + "/" + name
	}
	rest := strings.Split(name, "/")
	at, links := ".", 0
	n = node{mode: fs.ModeDir, ok: true}
	for len(rest) > 0 {
		part := rest[0]
		rest = rest[1:]
		if part == "" || part == "." {
			continue
		}
		if !n.mode.IsDir() {
			return "", node{}
		}
		if part == ".." {
			at = path.Dir(at)
			n = a.lstat(at)
			continue
		}
		next := path.Join(at, part)
		if n = a.lstat(next); !n.ok {
			return "", node{}
		}
		if n.mode&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		if links++; links > maxLinks || len(n.link)+len(rest) > maxName {
			return "", node{}
		}
		if strings.HasPrefix(n.link, "/") {
			at = "."
		}
		rest = append(strings.Split(n.link, "/"), rest...)
		n = node{mode: fs.ModeDir, ok: true}
	}
	return at, n
}

// lstat looks one name up, once.
func (a *analysis) lstat(name string) node {
	if name == "." {
		return node{mode: fs.ModeDir, ok: true}
	}
	if n, ok := a.nodes[name]; ok {
		return n
	}
	if a.stopped() {
		return node{}
	}
	if a.lookups++; a.lookups > a.options.MaxLookups {
		a.stop("too many names looked up")
		return node{}
	}
	var n node
	if info, err := a.root.Lstat(name); err == nil {
		n = node{mode: info.Mode(), size: info.Size(), ok: true}
		if n.mode&fs.ModeSymlink != 0 {
			if n.link, err = a.root.ReadLink(name); err != nil {
				n = node{}
			}
		}
	}
	a.nodes[name] = n
	return n
}

func (a *analysis) isFile(name string) bool {
	_, n := a.resolve(name)
	return n.ok && n.mode.IsRegular()
}

func (a *analysis) isDir(name string) bool {
	_, n := a.resolve(name)
	return n.ok && n.mode.IsDir()
}

// list gives the names in a directory, sorted, up to a bound.
func (a *analysis) list(dir string) []string {
	real, n := a.resolve(dir)
	if !n.ok || !n.mode.IsDir() || a.stopped() {
		return nil
	}
	if names, ok := a.lists[real]; ok {
		return names
	}
	const maxNames = 10_000
	var names []string
	if f, err := a.root.Open(real); err == nil {
		if d, ok := f.(fs.ReadDirFile); ok {
			entries, _ := d.ReadDir(maxNames) // what was read before an error is there
			for _, e := range entries {
				names = append(names, e.Name())
			}
		}
		_ = f.Close()
	}
	if a.lookups += len(names); a.lookups > a.options.MaxLookups {
		a.stop("too many names looked up")
	}
	slices.Sort(names)
	a.lists[real] = names
	return names
}

// glob expands a pattern of which any element may be one.
func (a *analysis) glob(pattern string) []string {
	if !strings.HasPrefix(pattern, "/") {
		pattern = a.cwd + "/" + pattern
	}
	const maxMatches = 5_000
	found := []string{"/"}
	for part := range strings.SplitSeq(path.Clean(pattern), "/") {
		if part == "" {
			continue
		}
		var next []string
		for _, dir := range found {
			if !strings.ContainsAny(part, "*?[") {
				next = append(next, path.Join(dir, part))
				continue
			}
			for _, name := range a.list(dir) {
				if ok, err := path.Match(part, name); err == nil && ok && (name[0] != '.' || part[0] == '.') {
					next = append(next, path.Join(dir, name))
				}
			}
			if len(next) > maxMatches {
				break
			}
		}
		found = next
	}
	return slices.DeleteFunc(found, func(name string) bool { _, n := a.resolve(name); return !n.ok })
}

// contents reads a whole file, or as much as the bounds allow.
func (a *analysis) contents(name string) []byte {
	return a.head(name, a.options.MaxFileBytes)
}

// head reads the first bytes of a file.
func (a *analysis) head(name string, most int64) []byte {
	var data []byte
	a.open(name, func(f fs.File, size int64) {
		data = make([]byte, min(most, size, a.options.MaxFileBytes))
		n, err := io.ReadFull(f, data)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			n = 0
		}
		data = data[:n]
		a.count(int64(n))
	})
	return data
}

func (a *analysis) count(n int64) {
	if a.read += n; a.read > a.options.MaxBytes {
		a.stop("too many bytes read")
	}
}

// open calls do with a regular file.
func (a *analysis) open(name string, do func(f fs.File, size int64)) {
	real, n := a.resolve(name)
	if !n.ok || !n.mode.IsRegular() || a.stopped() {
		return
	}
	f, err := a.root.Open(real)
	if err != nil {
		return
	}
	defer f.Close()
	do(f, n.size)
}

// readAt gives a reader of parts of a file. Of a file that has none, the beginning is read.
func (a *analysis) readAt(f fs.File, size int64) io.ReaderAt {
	if r, ok := f.(io.ReaderAt); ok {
		return counted{r, a}
	}
	data, err := io.ReadAll(io.LimitReader(f, min(size, a.options.MaxFileBytes)))
	a.count(int64(len(data)))
	if err != nil {
		data = nil
	}
	return strings.NewReader(string(data))
}

type counted struct {
	io.ReaderAt
	a *analysis
}

func (c counted) ReadAt(p []byte, off int64) (int, error) {
	if c.a.stopped() {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.ReaderAt.ReadAt(p, off)
	c.a.count(int64(n))
	return n, err
}
