// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"
	"io"
	"unsafe"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// ViewStats sums up a view.
type ViewStats struct {
	Entries int64 // visible names, the root included
	Inodes  int64 // distinct inodes among them
	Files   int64 // distinct data files
	Bytes   int64 // of the image with its footer
	// Devices are the layers whose data files are visible, bottom first. The pack
	// of Devices[i] is device i of [MountView].
	Devices []uint64
}

// WriteView merges the chain as overlayfs does and writes the view, the image that
// containers mount (docs/store.md), front to back without seeking or syncing.
// blocks has for each layer the blocks of its pack, footer not included; layers
// without a visible data file need none. The same chain gives the same bytes.
//
// Implied directories take the attributes of the topmost lower directory that is
// not implied, and mode 0755, root:root and their own mtime where there is none.
// Memory is some 75 bytes for each name and data file of the layers.
//
// Errors: errdefs.ErrInvalidArgument for what EROFS cannot hold and for malformed
// metadata, errdefs.ErrFailedPrecondition for a reference to a data file that the
// chain does not have.
func WriteView(ctx context.Context, c Chain, blocks map[uint64]uint32, w io.Writer) (ViewStats, error) {
	if err := c.check(); err != nil {
		return ViewStats{}, fmt.Errorf("write view: %w", err)
	}
	sum := &summed{w: w}
	v := &viewWriter{ctx: ctx, chain: c, links: map[*Inode]*viewLinks{}, out: &erofs.Writer{W: sum}}
	for _, step := range []func() error{
		v.collect, func() error { return v.home.resolve(c, blocks) }, v.layout, v.writeTree, v.writeHome, v.writeData,
	} {
		if err := step(); err != nil {
			return ViewStats{}, fmt.Errorf("write view: %w", err)
		}
	}
	if _, err := w.Write(appendViewFooter(nil, v.out.Pos, sum.crc)); err != nil {
		return ViewStats{}, fmt.Errorf("write view: %w", err)
	}
	return ViewStats{
		Entries: int64(len(v.nodes)), Inodes: int64(v.inodes), Files: int64(len(v.home.files)),
		Bytes: v.out.Pos + int64(viewFooterSize), Devices: v.home.devices,
	}, nil
}

// summed is a writer that computes the checksum of what it hands on.
type summed struct {
	w   io.Writer
	crc uint32
}

func (s *summed) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.crc = Sum(s.crc, p[:n])
	return n, err
}

// viewNode is what the writer keeps of a visible name.
type viewNode struct {
	node   *Node
	inode  *Inode
	nid    uint32
	parent uint32 // directory
	next   uint32 // next name in the same directory, 0 at the end
	child  uint32 // of a directory the first name, 0 if empty; of a further name of an inode the node of its first name
	tail   uint32 // bytes of chunk indexes, of [Inode.Inline], or of a directory
	block  uint32 // first data block, counted from the first of all
	xattrs uint32 // bytes of the xattr area
	typ    byte   // erofs.FileType
	alias  bool   // a further name of an inode
}

// viewLinks counts the visible names of an inode that may have several.
type viewLinks struct{ node, names uint32 }

// viewFrame is a directory that is being collected.
type viewFrame struct {
	node, last uint32
	names      erofs.DirNames
	size       erofs.DirLayout
}

// viewWriter writes one view. It is the visitor of the merge.
type viewWriter struct {
	ctx      context.Context
	chain    Chain
	nodes    []viewNode // of t/, in path order
	links    map[*Inode]*viewLinks
	frames   []*viewFrame
	free     []*viewFrame // frames are many, their closures need not be
	inodes   uint64
	home     home
	redirect []byte    // buffer
	dirs     dirBlocks // buffers

	shared uint32 // id of the shared metacopy xattr
	meta   uint64 // end of the metadata, in bytes
	data   uint64 // data blocks behind it
	ino    uint32 // last inode number
	out    *erofs.Writer
}

// collect makes the nodes.
func (v *viewWriter) collect() error {
	names, files := v.chain.count()
	v.nodes, v.home.files = make([]viewNode, 0, names), make([]homeFile, 0, files)
	root, parts := v.chain.root()
	if err := v.enter(&root); err != nil {
		return err
	}
	return merge(v.ctx, parts, v)
}

func (v *viewWriter) enter(e *visible) error {
	if len(v.nodes) == 1<<32-1 {
		return fmt.Errorf("more than 2^32 names: %w", errdefs.ErrInvalidArgument)
	}
	i := uint32(len(v.nodes))
	n := viewNode{node: e.node, inode: e.inode, typ: erofs.FileType(e.inode.Mode)}
	if len(v.frames) > 0 {
		f := v.frames[len(v.frames)-1]
		n.parent = f.node
		f.names.Name(bytesOf(e.node.Name))
		if f.last == 0 {
			v.nodes[f.node].child = i
		} else {
			v.nodes[f.last].next = i
		}
		f.last = i
	}
	if e.inode.Nlink != 1 && !e.node.Dir() {
		if l := v.links[e.inode]; l != nil {
			l.names++
			n.alias, n.child = true, l.node
			v.nodes = append(v.nodes, n)
			return nil
		}
		v.links[e.inode] = &viewLinks{node: i, names: 1}
	}
	v.inodes++
	if err := v.measure(&n, e); err != nil {
		return fmt.Errorf("%q of layer %d %w", v.path(i, e), e.layer, err)
	}
	v.nodes = append(v.nodes, n)
	if e.node.Dir() {
		v.push(i)
	}
	return nil
}

func (v *viewWriter) push(node uint32) {
	var f *viewFrame
	if n := len(v.free); n > 0 {
		f, v.free = v.free[n-1], v.free[:n-1]
	} else {
		f = &viewFrame{}
		f.names.Add = func(name []byte, _ int) { f.size.Add(len(name)) }
	}
	f.node, f.last, f.names.Dots, f.size = node, 0, 0, erofs.DirLayout{}
	v.frames = append(v.frames, f)
}

func (v *viewWriter) leave() error {
	f := v.frames[len(v.frames)-1]
	size, err := endDir(&f.names, &f.size)
	v.nodes[f.node].tail = size
	v.frames, v.free = v.frames[:len(v.frames)-1], append(v.free, f)
	return err
}

// measure sets what follows the inode, but for directories, whose names are not
// known yet.
func (v *viewWriter) measure(n *viewNode, e *visible) error {
	i := e.inode
	if err := checkInode(i); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	redirect := 0
	switch {
	case i.HasData():
		v.redirect = i.Data.AppendRedirect(v.redirect[:0])
		redirect = len(v.redirect)
		n.tail = uint32((i.Size-1)>>holeChunkBits+1) * 4
		v.home.add(i, e.layer)
	case i.Inline != "":
		n.tail = uint32(len(i.Inline))
	}
	x := xattrArea(i, redirect)
	if x > erofs.XattrAreaMax {
		return fmt.Errorf("has %d bytes of xattrs, the limit is %d: %w", x, erofs.XattrAreaMax, errdefs.ErrInvalidArgument)
	}
	n.xattrs = uint32(x)
	return nil
}

// path of a name that is not among the nodes yet, for errors.
func (v *viewWriter) path(i uint32, e *visible) string {
	if i == 0 {
		return "/"
	}
	path := e.node.Name
	for d := v.frames[len(v.frames)-1].node; d != 0; d = v.nodes[d].parent {
		path = v.nodes[d].node.Name + "/" + path
	}
	return "/" + path
}

// bytesOf is the bytes of a string without a copy; they must not be changed.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
