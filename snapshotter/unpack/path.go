// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Paths in the layer are clean and begin with a slash; the root is "/". The
// functions below answer as the kernel and continuity's fs.RootPath do for an
// upper directory that holds the tree.

const (
	maxName  = 255  // bytes of a component, NAME_MAX
	maxPath  = 4095 // bytes of a path or a symlink's target, PATH_MAX without the NUL
	maxLinks = 255  // symlinks in one path, as fs.RootPath has it

	// maxSteps bounds the components that lstat walks over for one layer. Each
	// path through symlinks costs the square of its depth and more, so that a
	// small layer could take hours. A layer whose 100 000 paths lead through one
	// symlink at a depth of 8 takes 13 million steps.
	maxSteps = 1 << 28
)

var errTooManyLinks = errors.New("too many links")

// next cuts the first component off p, which may begin with slashes.
func next(p string) (name, rest string) {
	p = strings.TrimLeft(p, "/")
	name, rest, _ = strings.Cut(p, "/")
	return name, rest
}

// lstat returns what stands at a path, without following a symlink at its end.
// The error is ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG or errTooManyLinks.
func (t *tree) lstat(p string) (*pack.Node, error) {
	if len(p) > maxPath {
		return nil, unix.ENAMETOOLONG
	}
	at := []*pack.Node{t.root} // from the root to where the walk is
	for links := 0; ; {
		var name string
		name, p = next(p)
		dir := at[len(at)-1]
		switch {
		case name == "":
			return dir, nil
		case !dir.Dir():
			return nil, unix.ENOTDIR
		case name == ".":
			continue
		case name == "..":
			if len(at) == 1 {
				return nil, unix.ENOENT // leaves the layer
			}
			at = at[:len(at)-1]
			continue
		case len(name) > maxName:
			return nil, unix.ENAMETOOLONG
		}
		if t.steps++; t.steps > maxSteps {
			return nil, errTooManyLinks
		}
		n := t.child(dir, name)
		if n == nil {
			return nil, unix.ENOENT
		}
		if rest, _ := next(p); rest == "" || !symlink(n) {
			at = append(at, n)
			continue
		}
		if links++; links > 40 {
			return nil, unix.ELOOP
		}
		if strings.HasPrefix(n.Inode.Inline, "/") {
			return nil, unix.ENOENT // leaves the layer
		}
		p = n.Inode.Inline + "/" + p
	}
}

func symlink(n *pack.Node) bool {
	return n.Inode != nil && n.Inode.Mode&unix.S_IFMT == unix.S_IFLNK
}

// rootPath resolves p within the layer, with the symlinks of the layer followed
// and bounded by its root. What does not exist stays as it is.
func (t *tree) rootPath(p string) (string, error) {
	if clean, ok := t.plain(p); ok {
		return clean, nil
	}
	links := 0
	for {
		before := links
		q, err := t.walkLinks(p, &links)
		if err != nil {
			return "", err
		}
		p = q
		if before == links {
			q = path.Join("/", q)
			if p == q {
				return q, nil
			}
			p = q
		}
	}
}

// plain answers for the paths that nearly all are: clean, and through
// directories alone as far as they exist.
func (t *tree) plain(p string) (string, bool) {
	clean := path.Join("/", p)
	if s := strings.TrimSuffix(p, "/"); clean[1:] != s && clean != s && s != "" {
		return "", false
	}
	n := t.root
	for rest := clean; ; {
		var name string
		if name, rest = next(rest); name == "" {
			return clean, true
		}
		if len(name) > maxName || len(clean) > maxPath {
			return "", false
		}
		if n == nil {
			continue
		}
		if n = t.child(n, name); n != nil && !n.Dir() {
			return "", false
		}
	}
}

func (t *tree) walkLink(p string, links *int) (string, bool, error) {
	if *links > maxLinks {
		return "", false, errTooManyLinks
	}
	p = path.Join("/", p)
	if p == "/" {
		return p, false, nil
	}
	n, err := t.lstat(p)
	if errors.Is(err, unix.ENOENT) {
		return p, false, nil
	}
	if err != nil {
		return "", false, err
	}
	if !symlink(n) {
		return p, false, nil
	}
	*links++
	return n.Inode.Inline, true, nil
}

func (t *tree) walkLinks(p string, links *int) (string, error) {
	dir, file := path.Split(p)
	switch {
	case dir == "":
		q, _, err := t.walkLink(file, links)
		return q, err
	case file == "":
		if dir == "/" {
			return dir, nil
		}
		return t.walkLinks(dir[:len(dir)-1], links)
	}
	newDir, err := t.walkLinks(dir, links)
	if err != nil {
		return "", err
	}
	q, link, err := t.walkLink(path.Join(newDir, file), links)
	if err != nil || !link || path.IsAbs(q) {
		return q, err
	}
	return path.Join(newDir, q), nil
}

// mkparent returns the directory at p, made with those above it where they do
// not exist.
func (t *tree) mkparent(p string) (*pack.Node, error) {
	if len(p) > maxPath {
		return nil, unix.ENAMETOOLONG
	}
	dir := t.root
	for {
		var name string
		if name, p = next(p); name == "" {
			return dir, nil
		}
		if len(name) > maxName {
			return nil, unix.ENAMETOOLONG
		}
		n := t.child(dir, name)
		switch {
		case n == nil:
			n = t.nodes.take()
			n.Name, n.Inode = t.text.clone(name), t.inodes.take()
			n.Inode.Mode, n.Inode.Implied = unix.S_IFDIR, true
			inherit(dir.Inode, n.Inode)
			chmod(n.Inode, 0o755)
			t.add(dir, n)
		case !n.Dir():
			return nil, unix.ENOTDIR
		}
		dir = n
	}
}
