// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Entry is one name in the merged tree of a chain.
type Entry struct {
	Path string // absolute; "/" is the root
	// Inode has the attributes; it must not be changed. Names of one inode have the
	// same pointer. Attributes of an implied directory are those of the directory
	// below. Xattrs may hold names that do not reach a container.
	*Inode
	Layer uint64 // of the topmost entry
	Nlink uint32 // visible names of the inode, which its layer may have more of; 1 for a directory
}

// Entries iterates over the merged tree in path order: names compare bytewise
// within a directory, and a directory comes before what is in it. An error ends
// the iteration; errors are those of [WriteView].
func (c Chain) Entries(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := c.entries(ctx, yield); err != nil && !errors.Is(err, errStop) {
			yield(Entry{}, fmt.Errorf("list chain: %w", err))
		}
	}
}

var errStop = errors.New("iteration stopped")

func (c Chain) entries(ctx context.Context, yield func(Entry, error) bool) error {
	if err := c.check(); err != nil {
		return err
	}
	root, parts := c.root()
	// The number of visible names of an inode is known only after all of them.
	count := linkCounter{}
	if err := merge(ctx, parts, count); err != nil {
		return err
	}
	l := &lister{yield: yield, links: count}
	if err := l.enter(&root); err != nil {
		return err
	}
	_, parts = c.root()
	return merge(ctx, parts, l)
}

// linkCounter counts the visible names of inodes that may have several.
type linkCounter map[*Inode]uint32

func (l linkCounter) enter(v *visible) error {
	if v.inode.Nlink != 1 && !v.node.Dir() {
		l[v.inode]++
	}
	return nil
}

func (l linkCounter) leave() error { return nil }

// lister hands out entries.
type lister struct {
	yield func(Entry, error) bool
	links linkCounter
	path  []byte // of the directory that is being visited, with a slash at its end
	ends  []int  // length of path of each directory above
}

func (l *lister) enter(v *visible) error {
	begin := len(l.path)
	l.path = append(l.path, v.node.Name...)
	e := Entry{Path: string(l.path), Inode: v.inode, Layer: v.layer, Nlink: 1}
	if begin == 0 {
		e.Path = "/"
	}
	if n := l.links[v.inode]; n > 0 {
		e.Nlink = n
	}
	if v.node.Dir() {
		l.ends, l.path = append(l.ends, begin), append(l.path, '/')
	} else {
		l.path = l.path[:begin]
	}
	if !l.yield(e, nil) {
		return errStop
	}
	return nil
}

func (l *lister) leave() error {
	last := len(l.ends) - 1
	l.path, l.ends = l.path[:l.ends[last]], l.ends[:last]
	return nil
}
