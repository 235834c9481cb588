// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

const (
	// packRootNid is the first inode. Slot 0 stays free: programs take inode number 0 for none.
	packRootNid = erofs.InodeSize / erofs.SlotSize

	// References are chunk-based inodes with the largest chunk there is: 2^31 blocks, 8 TiB.
	refChunkFormat = 31
	refChunkBits   = erofs.BlockBits + refChunkFormat
)

// entry is what metaWriter keeps of a name. The names of a directory stand one behind the other.
type entry struct {
	node   *Node
	nid    uint32
	xsize  uint32 // xattrs
	tail   uint32 // bytes of a directory, of [Inode.Inline], of the chunk indexes of a reference
	block  uint32 // first block of its own, counted from the first behind the inodes
	first  uint32 // directories: their first name; others: the first name of the inode
	parent uint32
}

// metaWriter writes the EROFS metadata of a layer: inodes in breadth-first order, each once, then the blocks of large
// directories and long symlinks.
type metaWriter struct {
	meta    *Meta
	index   []byte
	start   uint32 // block at which the metadata begins
	entries []entry
	links   map[*Inode]*link // inodes with several names
	white   link             // whiteouts share an inode
	used    []uint64         // numbers that have an inode, a bit each
	inodes  uint32           // blocks of inodes
	blocks  uint32           // blocks behind them
	stats   Stats
	dirents []erofs.Dirent // of the block of a directory that is being written
	text    []byte         // the names in dirents
}

type link struct {
	first uint32
	names uint32
}

func newMetaWriter(m *Meta, index []byte, start uint32) *metaWriter {
	return &metaWriter{meta: m, index: index, start: start, links: map[*Inode]*link{}, used: make([]uint64, len(index)/indexEntry/64+1)}
}

// whiteInode is the inode of whiteouts.
var whiteInode = &Inode{Mode: unix.S_IFCHR}

// inode is the inode that is written for a name. Overlayfs takes any device 0:0 for a whiteout.
func (e *entry) inode() *Inode {
	if i := e.node.Inode; i != nil && (i.Rdev != 0 || i.Mode&unix.S_IFMT != unix.S_IFCHR) {
		return i
	}
	return whiteInode
}

func (e *entry) dir() bool { return e.node.Dir() }

// alias tells whether entry i is a further name of an inode.
func (m *metaWriter) alias(i int) bool {
	return !m.entries[i].dir() && m.entries[i].first != uint32(i)
}

// plan checks the layer and gives each inode its place.
func (m *metaWriter) plan() error {
	if r := m.meta.Root; r == nil || !r.Dir() || r.Name != "" {
		return fmt.Errorf("layer %d has no root directory: %w", m.meta.Layer, errdefs.ErrInvalidArgument)
	}
	if err := m.collect(); err != nil {
		return err
	}
	for _, l := range m.links {
		if e := &m.entries[l.first]; e.node.Inode.Nlink != l.names {
			return fmt.Errorf("%q has %d names, its inode says %d: %w", m.path(l.first), l.names, e.node.Inode.Nlink, errdefs.ErrInvalidArgument)
		}
	}
	for n := range len(m.index) / indexEntry {
		if m.used[n/64]&(1<<(n%64)) == 0 {
			clear(m.index[n*indexEntry : (n+1)*indexEntry])
		}
	}
	m.stats.Entries = int64(len(m.entries))
	return m.layout()
}

// count returns the number of names, so that entries need not grow. It refuses what is too deep.
func (m *metaWriter) count() (int, error) {
	n := 1
	stack := [][]*Node{m.meta.Root.Children}
	for len(stack) > 0 {
		top := stack[len(stack)-1]
		if len(top) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		stack[len(stack)-1] = top[1:]
		if n++; len(top[0].Children) > 0 {
			if stack = append(stack, top[0].Children); len(stack) > depthMax {
				return 0, fmt.Errorf("layer %d is deeper than %d directories: %w", m.meta.Layer, depthMax, errdefs.ErrInvalidArgument)
			}
		}
	}
	return n, nil
}

// collect makes the entries.
func (m *metaWriter) collect() error {
	n, err := m.count()
	if err != nil {
		return err
	}
	m.entries = append(make([]entry, 0, n), entry{node: m.meta.Root})
	for i := 0; i < len(m.entries); i++ {
		if err := m.add(uint32(i)); err != nil {
			return fmt.Errorf("%q of layer %d %w", m.path(uint32(i)), m.meta.Layer, err)
		}
	}
	return nil
}

// add measures entry i and appends the names in it.
func (m *metaWriter) add(i uint32) error {
	e := &m.entries[i]
	in := e.inode()
	if i > 0 {
		if err := checkNodeName(e.node.Name); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if !e.dir() {
		if len(e.node.Children) > 0 {
			return fmt.Errorf("is no directory and has names in it: %w", errdefs.ErrInvalidArgument)
		}
		if e.first = i; m.further(i, in) {
			return nil
		}
	}
	m.stats.Inodes++
	if err := checkInode(in); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	x := 0
	for name, value := range eachXattr(in, m.meta.Layer) {
		_, suffix, _ := erofs.SplitXattr(name)
		x += erofs.XattrSize(len(suffix), len(value))
	}
	if x > 0 {
		x += erofs.XattrHeaderSize
	}
	if x > erofs.XattrAreaMax {
		return fmt.Errorf("has %d bytes of xattrs, the limit is %d: %w", x, erofs.XattrAreaMax, errdefs.ErrInvalidArgument)
	}
	e.xsize = uint32(x)
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return m.addNames(i)
	case unix.S_IFLNK:
		e.tail = uint32(len(in.Inline))
	case unix.S_IFREG:
		if in.HasData() {
			return m.addData(e, in)
		}
		if e.tail = uint32(len(in.Inline)); e.tail > 0 {
			m.stats.Files++
			m.stats.DataBytes += in.Size
		}
	}
	return nil
}

// further takes a name; it tells whether the inode had one before.
func (m *metaWriter) further(i uint32, in *Inode) bool {
	l := &m.white
	if in != whiteInode {
		if in.Nlink <= 1 {
			return false
		}
		if l = m.links[in]; l == nil {
			m.links[in] = &link{i, 1}
			return false
		}
	}
	if l.names++; l.names == 1 {
		l.first = i
		return false
	}
	m.entries[i].first = l.first
	return true
}

// addData takes the data file of an inode.
func (m *metaWriter) addData(e *entry, in *Inode) error {
	if in.Data.Layer != m.meta.Layer {
		e.tail = uint32((in.Size-1)>>refChunkBits+1) * 4
		return nil
	}
	n := in.Data.Number
	x, ok := Index{m.index}.At(n)
	if !ok || x.Size != in.Size {
		return fmt.Errorf("has %d bytes in file %d, in which there are %d: %w", in.Size, n, x.Size, errdefs.ErrInvalidArgument)
	}
	if bit := uint64(1) << ((n - 1) % 64); m.used[(n-1)/64]&bit == 0 {
		m.used[(n-1)/64] |= bit
	} else {
		return fmt.Errorf("has file %d, which another inode has: %w", n, errdefs.ErrInvalidArgument)
	}
	in.Block, in.Sum = x.Block, x.Sum
	m.stats.Files++
	m.stats.DataBytes += x.Size
	if x.Hole {
		m.stats.HoleBytes += x.Size
	}
	return nil
}

// addNames measures a directory and appends its names.
func (m *metaWriter) addNames(i uint32) error {
	dir := m.entries[i].node
	m.entries[i].first = uint32(len(m.entries))
	var size erofs.DirLayout
	names := erofs.DirNames{Add: func(name []byte, _ int) { size.Add(len(name)) }}
	var buf [nameMax]byte
	last := ""
	for _, c := range dir.Children {
		if c.Name <= last {
			return fmt.Errorf("has names out of order, %q behind %q: %w", c.Name, last, errdefs.ErrInvalidArgument)
		}
		last = c.Name
		names.Name(buf[:copy(buf[:], c.Name)])
		m.entries = append(m.entries, entry{node: c, parent: i})
	}
	names.End()
	if size.Size() >= 1<<32 {
		return fmt.Errorf("is a directory of %d bytes, the limit is 2^32: %w", size.Size(), errdefs.ErrInvalidArgument)
	}
	m.entries[i].tail = uint32(size.Size())
	return nil
}

// path is the path of an entry, for errors.
func (m *metaWriter) path(i uint32) string {
	var parts []string
	for ; i > 0; i = m.entries[i].parent {
		parts = append(parts, m.entries[i].node.Name)
	}
	return joinPath(parts)
}

// inlineTail tells how much of the tail stands in blocks of its own and how much behind the inode; whole says that the
// latter must not cross a block.
func (e *entry) inlineTail() (blocks uint32, inline int, whole bool) {
	if in := e.inode(); in.Mode&unix.S_IFMT == unix.S_IFDIR || in.Inline != "" {
		if t := e.tail % BlockSize; t <= erofs.TailMax {
			return e.tail / BlockSize, int(t), true
		}
		return e.tail/BlockSize + 1, 0, true
	}
	return 0, int(e.tail), false // chunk indexes are read one by one
}

// layout gives each inode its place.
func (m *metaWriter) layout() error {
	pos := uint64(packRootNid * erofs.SlotSize)
	blocks := uint64(0)
	for i := range m.entries {
		e := &m.entries[i]
		if m.alias(i) {
			e.nid = m.entries[e.first].nid
			continue
		}
		own, inline, whole := e.inlineTail()
		e.block = uint32(blocks)
		blocks += uint64(own)
		pos = erofs.Align(pos, erofs.SlotSize)
		head := uint64(erofs.InodeSize) + uint64(e.xsize)
		for pos%BlockSize+erofs.InodeSize > BlockSize || whole && inline > 0 && (pos+head)%BlockSize+uint64(inline) > BlockSize {
			pos += erofs.SlotSize
		}
		if pos > metaMax {
			break
		}
		e.nid = uint32(pos / erofs.SlotSize)
		pos += head + uint64(inline)
	}
	// fsck.erofs looks for an xattr header behind inodes that have none: the image must not end there.
	inodes := erofs.Align(pos+erofs.XattrHeaderSize, BlockSize) / BlockSize
	if uint64(m.start)+inodes+blocks > blocksMax {
		return fmt.Errorf("layer %d needs more than 2^32 blocks: %w", m.meta.Layer, errdefs.ErrInvalidArgument)
	}
	if size := (inodes + blocks) * BlockSize; size > metaMax {
		return fmt.Errorf("layer %d has %d bytes of metadata, the limit is %d: %w", m.meta.Layer, size, metaMax, errdefs.ErrInvalidArgument)
	}
	m.inodes, m.blocks = uint32(inodes), uint32(blocks)
	return nil
}
