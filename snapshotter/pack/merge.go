// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxDevices is the most that a view has: the kernel counts them in 16 bits.
const maxDevices = 1 << 15

// Chain is the metadata of a chain of layers, bottom layer first. The layers are distinct.
type Chain []*Meta

// visible is one name of the merged tree.
type visible struct {
	node  *Node  // the topmost entry, which gives the name
	inode *Inode // the attributes; of an implied directory those of the directory below
	layer uint64 // of node
}

// part is a directory of one layer that takes part in a merged directory.
type part struct {
	dir   *Node
	layer uint64
	next  int // the first child that was not visited yet
	// hidden directories lie below an opaque one. Their names do not show, but an
	// implied directory takes the attributes of a hidden one, as containerd's
	// applier does.
	hidden bool
}

// candidate is an entry of one layer at the name in question.
type candidate struct {
	node   *Node
	layer  uint64
	hidden bool
}

// choose decides what overlayfs shows at one name (ovl_lookup in
// fs/overlayfs/namei.c). Candidates are in order, topmost first, hidden ones
// last, at least one. The first is visible unless it is a whiteout. Below a
// directory further directories take part until one is opaque or something else
// than a directory stands there; choose appends them to parts.
func choose(candidates []candidate, parts []part) (v visible, _ []part, ok bool) {
	top := candidates[0]
	if top.hidden || top.node.Whiteout() {
		return v, parts, false
	}
	v = visible{node: top.node, inode: top.node.Inode, layer: top.layer}
	if !top.node.Dir() {
		return v, parts, true
	}
	begin, hidden := len(parts), false
	for _, c := range candidates {
		if !c.node.Dir() {
			break
		}
		hidden = hidden || c.hidden
		parts = append(parts, part{dir: c.node, layer: c.layer, hidden: hidden})
		hidden = hidden || c.node.Inode.Opaque
	}
	if v.inode.Implied {
		v.inode = attributes(parts[begin:])
	}
	return v, parts, true
}

// attributes of an implied directory: of the topmost directory that is not
// implied, or what an unpacker gives to a directory that it has to make.
func attributes(parts []part) *Inode {
	for _, p := range parts {
		if !p.dir.Inode.Implied {
			return p.dir.Inode
		}
	}
	own := parts[0].dir.Inode
	return &Inode{Mode: unix.S_IFDIR | 0o755, Sec: own.Sec, Nsec: own.Nsec}
}

// find returns the child of that name, or nil.
func (n *Node) find(name string) *Node {
	i, ok := slices.BinarySearchFunc(n.Children, name, func(n *Node, name string) int { return strings.Compare(n.Name, name) })
	if !ok {
		return nil
	}
	return n.Children[i]
}

// check refuses chains that cannot be merged.
func (c Chain) check() error {
	if len(c) == 0 {
		return fmt.Errorf("merge chain: it has no layers: %w", errdefs.ErrInvalidArgument)
	}
	if len(c) > maxDevices {
		return fmt.Errorf("merge %d layers: the limit is %d: %w", len(c), maxDevices, errdefs.ErrInvalidArgument)
	}
	seen := make(map[uint64]bool, len(c))
	for _, m := range c {
		if seen[m.Layer] {
			return fmt.Errorf("merge chain: layer %d is in it twice: %w", m.Layer, errdefs.ErrInvalidArgument)
		}
		seen[m.Layer] = true
		if m.Root == nil || !m.Root.Dir() {
			return fmt.Errorf("merge chain: the root of layer %d is not a directory: %w", m.Layer, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// count returns how many names and data files the merged tree has at the most.
// More memory than is needed costs less than slices that grow.
func (c Chain) count() (names, files int) {
	for _, m := range c {
		names++
		files += int(m.Numbers)
		for todo := []*Node{m.Root}; len(todo) > 0; {
			n := todo[len(todo)-1]
			todo = todo[:len(todo)-1]
			names += len(n.Children)
			for _, child := range n.Children {
				if len(child.Children) > 0 {
					todo = append(todo, child)
				}
			}
		}
	}
	return names, min(files, names)
}

// root of the merged tree.
func (c Chain) root() (visible, []part) {
	candidates := make([]candidate, 0, len(c))
	for _, m := range slices.Backward(c) {
		candidates = append(candidates, candidate{node: m.Root, layer: m.Layer})
	}
	v, parts, _ := choose(candidates, nil)
	return v, parts
}

// lookup finds a name in a merged directory. below are the parts of the
// directory found, nil if it is something else.
func lookup(dir []part, name string) (v visible, below []part, ok bool) {
	var candidates []candidate
	for _, p := range dir {
		if n := p.dir.find(name); n != nil {
			candidates = append(candidates, candidate{n, p.layer, p.hidden})
		}
	}
	if len(candidates) == 0 {
		return v, nil, false
	}
	return choose(candidates, nil)
}

// visitor is told of each visible name in path order: enter at a name, leave
// after all names of a directory entered.
type visitor interface {
	enter(v *visible) error
	leave() error
}

// merge visits all that is below a merged directory; parts are those of the
// directory, and are used up. Names compare bytewise within a directory, and a
// directory comes before what is in it. The state is one frame for each level,
// on the heap: the depth of a tree is up to whoever made it.
func merge(ctx context.Context, parts []part, to visitor) error {
	var (
		candidates []candidate
		v          visible
		ok         bool
	)
	frames := []int{0} // where in parts each frame begins
	for n := 0; len(frames) > 0; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		begin := frames[len(frames)-1]
		var err error
		if candidates, err = gather(parts[begin:], candidates[:0]); err != nil {
			return err
		}
		if len(candidates) == 0 {
			frames, parts = frames[:len(frames)-1], parts[:begin]
			if err := to.leave(); err != nil {
				return err
			}
			continue
		}
		end := len(parts)
		if v, parts, ok = choose(candidates, parts); !ok {
			continue
		}
		if v.node.Dir() {
			frames = append(frames, end)
		}
		if err := to.enter(&v); err != nil {
			return err
		}
	}
	return nil
}

// gather takes the next name of a frame: the entries of all layers that have it.
func gather(frame []part, candidates []candidate) ([]candidate, error) {
	for i := range frame {
		p := &frame[i]
		if p.hidden || p.next == len(p.dir.Children) {
			continue
		}
		n, c := p.dir.Children[p.next], -1
		if len(candidates) > 0 {
			c = strings.Compare(n.Name, candidates[0].node.Name)
		}
		if c < 0 {
			candidates = candidates[:0]
		}
		if c <= 0 {
			candidates = append(candidates, candidate{n, p.layer, false})
		}
	}
	if len(candidates) == 0 {
		return candidates, nil
	}
	name := candidates[0].node.Name
	dir := candidates[0].node.Dir()
	for i, taken := 0, 0; i < len(frame); i++ {
		switch p := &frame[i]; {
		case p.hidden:
			if n := p.dir.find(name); dir && n != nil {
				candidates = append(candidates, candidate{n, p.layer, true})
			}
		case taken < len(candidates) && p.next < len(p.dir.Children) && p.dir.Children[p.next] == candidates[taken].node:
			if err := checkName(p.dir, p.next); err != nil {
				return nil, fmt.Errorf("merge layer %d: %w", p.layer, err)
			}
			p.next++
			taken++
		}
	}
	return candidates, nil
}

// checkName refuses children that would make a directory which the kernel
// cannot search.
func checkName(dir *Node, i int) error {
	name := dir.Children[i].Name
	if err := checkNodeName(name); err != nil {
		return fmt.Errorf("%q in %q %w: %w", name, dir.Name, err, errdefs.ErrInvalidArgument)
	}
	if i > 0 && dir.Children[i-1].Name >= name {
		return fmt.Errorf("the names of %q are out of order at %q: %w", dir.Name, name, errdefs.ErrInvalidArgument)
	}
	return nil
}
