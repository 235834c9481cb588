// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"cmp"
	"context"
	"fmt"
	"math/bits"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// home is h/ of a view: the visible data files by number, each one chunk of a
// device.
type home struct {
	files   []homeFile
	dirs    []homeDir // h, then each layer with its directories by number, in the order of files
	devices []uint64  // layers in the order of the chain
	blocks  []uint32  // of the packs of devices
	writer  dirBlocks // buffers
	numbers []byte
	foreign bool // there are references, whose place in the pack is to be looked up
}

// homeFile is a data file. key orders files by device, then by path.
type homeFile struct {
	key    uint64
	inode  *Inode
	nid    uint32
	device uint16 // from 1
	owned  bool   // inode is the one of the layer itself, which knows the place
}

// homeDir is a directory of h/.
type homeDir struct {
	name   string
	parent int
	subs   []int // directories in it, in byte order of their names
	files  []homeFile
	dirTail
}

// dirTail is where a directory of h/ stands.
type dirTail struct{ nid, size, block uint32 }

// add takes a data file; layer is the one whose metadata the inode is from.
func (h *home) add(i *Inode, layer uint64) {
	owned := i.Data.Layer == layer
	h.foreign = h.foreign || !owned
	h.files = append(h.files, homeFile{inode: i, owned: owned})
}

// numberKey orders numbers as their directory does: by the low 8 bits, then as
// decimal strings by bytes.
func numberKey(n uint32) uint64 {
	digits, left := uint64(1), uint64(n)
	for rest := n; rest >= 10; rest /= 10 {
		digits++
	}
	for d := digits; d < 10; d++ { // a uint32 has 10 digits at the most
		left *= 10
	}
	return uint64(n&0xff)<<38 | left<<4 | digits // left is below 10^10, less than 2^34
}

// resolve sorts the files, gives the layers their devices, and finds the places
// of references.
func (h *home) resolve(c Chain, blocks map[uint64]uint32) error {
	position := make(map[uint64]uint64, len(c))
	for i, m := range c {
		position[m.Layer] = uint64(i)
	}
	for i := range h.files {
		f := &h.files[i]
		p, ok := position[f.inode.Data.Layer]
		if !ok {
			return fmt.Errorf("data file %s is of a layer that is not in the chain: %w", f.inode.Data.Redirect(), errdefs.ErrFailedPrecondition)
		}
		f.key = p<<46 | numberKey(f.inode.Data.Number)
	}
	slices.SortFunc(h.files, func(a, b homeFile) int {
		switch {
		case a.key != b.key:
			return cmp.Compare(a.key, b.key)
		case a.owned == b.owned:
			return 0
		case a.owned:
			return -1
		}
		return 1
	})
	// A lower file may show besides references to it: the first of equals knows the place.
	h.files = slices.CompactFunc(h.files, func(a, b homeFile) bool { return a.key == b.key })
	if h.foreign {
		if err := h.lookup(c); err != nil {
			return err
		}
	}
	for i := range h.files {
		in := h.files[i].inode
		if n := len(h.devices); n == 0 || h.devices[n-1] != in.Data.Layer {
			b, ok := blocks[in.Data.Layer]
			if !ok {
				return fmt.Errorf("the size of the pack of layer %d is not given: %w", in.Data.Layer, errdefs.ErrInvalidArgument)
			}
			h.devices, h.blocks = append(h.devices, in.Data.Layer), append(h.blocks, b)
		}
		h.files[i].device = uint16(len(h.devices))
		need := (uint64(in.Size) + BlockSize - 1) / BlockSize
		if have := h.blocks[len(h.blocks)-1]; in.Block == 0 || uint64(in.Block)+need > uint64(have) {
			return fmt.Errorf("data file %s has %d blocks at %d of a pack of %d blocks: %w",
				in.Data.Redirect(), need, in.Block, have, errdefs.ErrInvalidArgument)
		}
	}
	return h.makeDirs()
}

// lookup puts in place of references the inodes of the layers that have the data.
func (h *home) lookup(c Chain) error {
	indexes := map[uint64]map[uint32]*Inode{}
	for i := range h.files {
		f := &h.files[i]
		if f.owned {
			continue
		}
		ref := f.inode.Data
		index := indexes[ref.Layer]
		if index == nil {
			index = c.layer(ref.Layer).dataFiles()
			indexes[ref.Layer] = index
		}
		if f.inode = index[ref.Number]; f.inode == nil {
			return fmt.Errorf("data file %s is not in its layer: %w", ref.Redirect(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// layer returns the metadata of a layer, or nil.
func (c Chain) layer(layer uint64) *Meta {
	for _, m := range c {
		if m.Layer == layer {
			return m
		}
	}
	return nil
}

// dataFiles are the inodes of the layer that have data in it, by number.
func (m *Meta) dataFiles() map[uint32]*Inode {
	files := map[uint32]*Inode{}
	todo := []*Node{m.Root}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = append(todo[:len(todo)-1], n.Children...)
		if i := n.Inode; i != nil && i.HasData() && i.Data.Layer == m.Layer {
			files[i.Data.Number] = i
		}
	}
	return files
}

// makeDirs makes the directories.
func (h *home) makeDirs() error {
	const hexDigits = "0123456789abcdef"
	h.dirs = []homeDir{{name: "h"}}
	layer := 0
	for begin := 0; begin < len(h.files); {
		ref := h.files[begin].inode.Data
		if begin == 0 || h.files[begin-1].inode.Data.Layer != ref.Layer {
			layer = len(h.dirs)
			h.dirs = append(h.dirs, homeDir{name: strconv.FormatUint(ref.Layer, 10)})
			h.dirs[0].subs = append(h.dirs[0].subs, layer)
		}
		end := begin
		for end < len(h.files) && h.files[end].key>>38 == h.files[begin].key>>38 {
			end++
		}
		low := byte(ref.Number)
		h.dirs[layer].subs = append(h.dirs[layer].subs, len(h.dirs))
		h.dirs = append(h.dirs, homeDir{name: string([]byte{hexDigits[low>>4], hexDigits[low&0xf]}), parent: layer, files: h.files[begin:end]})
		begin = end
	}
	slices.SortFunc(h.dirs[0].subs, func(a, b int) int { return cmp.Compare(h.dirs[a].name, h.dirs[b].name) })
	var number []byte
	for i := range h.dirs {
		d := &h.dirs[i]
		var size erofs.DirLayout
		names := erofs.DirNames{Add: func(name []byte, _ int) { size.Add(len(name)) }}
		for _, s := range d.subs {
			names.Name(bytesOf(h.dirs[s].name))
		}
		for _, f := range d.files {
			number = strconv.AppendUint(number[:0], uint64(f.inode.Data.Number), 10)
			names.Name(number)
		}
		var err error
		if d.size, err = endDir(&names, &size); err != nil {
			return err
		}
	}
	return nil
}

// fileSize is the size of the inode of a data file and of its chunk indexes.
// Most inodes are compact ones, which hold sizes below 4 GiB.
func fileSize(i *Inode) (inode, indexes int) {
	inode = erofs.CompactSize
	if i.Size >= 1<<32 {
		inode = erofs.InodeSize
	}
	return inode, erofs.ChunkIndexSize * int((i.Size-1)>>(erofs.BlockBits+chunkFormat(i))+1)
}

// chunkFormat is the logarithm of the size in blocks of the chunks of a data
// file: one chunk where that is possible.
func chunkFormat(i *Inode) uint32 {
	blocks := uint64(i.Size-1) / BlockSize
	return min(uint32(bits.Len64(blocks)), maxChunkFormat)
}

// write appends the inodes of h/ in the order of their nids; base is the first
// data block.
func (h *home) write(ctx context.Context, out *erofs.Writer, base uint32, ino *uint32) error {
	var buf []byte
	for i := range h.dirs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d := &h.dirs[i]
		*ino++
		blocks, inline := split(uint64(d.size))
		in := erofs.Inode{Mode: dirMode, Size: uint64(d.size), Ino: *ino, Nlink: uint32(2 + len(d.subs))}
		if blocks > 0 {
			in.U = base + d.block
		}
		if inline > 0 {
			in.Layout = erofs.LayoutInline
		}
		out.Pad(int64(d.nid) * erofs.SlotSize)
		buf = in.Append(buf[:0])
		if inline > 0 {
			buf = h.appendDir(buf, i, int(blocks), 1<<32)
		}
		out.Write(buf)
		for _, f := range d.files {
			*ino++
			buf = h.appendFile(buf[:0], f.inode, f.device, *ino)
			out.Pad(int64(f.nid) * erofs.SlotSize)
			out.Write(buf)
		}
		if out.Err != nil {
			return out.Err
		}
	}
	return nil
}

// appendFile appends the inode of a data file: chunks of a device.
func (h *home) appendFile(b []byte, i *Inode, device uint16, ino uint32) []byte {
	format := chunkFormat(i)
	in := erofs.Inode{
		Mode: fileMode, Layout: erofs.LayoutChunk, Size: uint64(i.Size), U: erofs.ChunkIndexes | format, Ino: ino, Nlink: 1,
	}
	size, indexes := fileSize(i)
	if size == erofs.CompactSize {
		b = in.AppendCompact(b)
	} else {
		b = in.Append(b)
	}
	for n := range uint32(indexes / erofs.ChunkIndexSize) {
		b = erofs.AppendChunk(b, device, i.Block+n<<format)
	}
	return b
}

// appendDir appends the blocks from first up to, not including, end of a
// directory.
func (h *home) appendDir(b []byte, dir, first, end int) []byte {
	d := &h.dirs[dir]
	parent := uint64(h.dirs[d.parent].nid)
	if dir == 0 {
		parent = rootNid
	}
	w := h.writer.begin(b, uint64(d.nid), parent, first, end)
	for _, s := range d.subs {
		w.add(bytesOf(h.dirs[s].name), uint64(h.dirs[s].nid), typeDir)
	}
	numbers := slices.Grow(h.numbers[:0], 10*len(d.files)) // none moves when another is appended
	h.numbers = numbers
	for _, f := range d.files {
		begin := len(numbers)
		numbers = strconv.AppendUint(numbers, uint64(f.inode.Data.Number), 10)
		w.add(numbers[begin:len(numbers):len(numbers)], uint64(f.nid), typeFile)
	}
	return w.finish()
}
