// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Behind the EROFS image, in the same file, stand the list of its files and a footer. So the two are one rename, and the
// list of devices cannot be that of another image.
//
//	list     u margin | u packs | pack* | u files | file*      u is an unsigned varint
//	pack     u layer, each larger than the one before
//	file     u index of the pack, u number | u first block in the pack | u size | u ranges | (u chunks from the last end, u chunks)*
//	footer   "nhybprt3" | list bytes, 8 | metadata bytes, 8 | SHA-256 of metadata, list, and the footer before it
const (
	footerMagic = "nhybprt3"
	footerSize  = 8 + 8 + 8 + sha256.Size
	// maxList bounds what is read into memory: a list of maxFiles files with as many ranges as profiles have is smaller.
	maxList = 64 << 20
)

// contents is a set with the places of its files in the packs.
type contents struct {
	Set
	refs   []pack.Ref // of the files
	blocks []uint32   // first ones of the files in their packs
	packs  []uint64   // layers, ascending; each is a device, the first is number 1
}

// newContents gives each pack of a set, which passes check, its place. Blocks are not known yet.
func newContents(s Set) (*contents, error) {
	c := &contents{Set: s, blocks: make([]uint32, len(s.Files))}
	for _, f := range s.Files {
		ref, err := pack.ParseRedirect(f.Redirect)
		if err != nil {
			return nil, err
		}
		c.refs = append(c.refs, ref)
		c.packs = append(c.packs, ref.Layer)
	}
	slices.Sort(c.packs)
	c.packs = slices.Compact(c.packs)
	return c, nil
}

// device is the number of the device with the bytes of a file.
func (c *contents) device(file int) uint16 {
	i, _ := slices.BinarySearch(c.packs, c.refs[file].Layer)
	return uint16(i + 1)
}

// size is how many blocks of a pack the image refers to.
func (c *contents) size(device uint16) (blocks int64) {
	for i := range c.Files {
		if c.device(i) == device {
			blocks = max(blocks, int64(c.blocks[i])+chunks(c.Files[i].Size))
		}
	}
	return blocks
}

func (c *contents) appendList(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(c.Margin))
	b = binary.AppendUvarint(b, uint64(len(c.packs)))
	for _, layer := range c.packs {
		b = binary.AppendUvarint(b, layer)
	}
	b = binary.AppendUvarint(b, uint64(len(c.Files)))
	for i, f := range c.Files {
		b = binary.AppendUvarint(b, uint64(c.device(i)-1))
		b = binary.AppendUvarint(b, uint64(c.refs[i].Number))
		b = binary.AppendUvarint(b, uint64(c.blocks[i]))
		b = binary.AppendUvarint(b, uint64(f.Size))
		b = binary.AppendUvarint(b, uint64(len(f.Hot)))
		last := int64(0)
		for _, r := range f.Hot {
			b = binary.AppendUvarint(b, uint64((r.Offset-last)/Chunk))
			b = binary.AppendUvarint(b, uint64(chunks(r.Length)))
			last = r.Offset + chunks(r.Length)*Chunk
		}
	}
	return b
}

// parseList is the reverse of appendList. The set passes check.
func parseList(b []byte) (*contents, error) {
	bad := false
	number := func(limit uint64) int64 {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > limit {
			bad = true
			return 0
		}
		b = b[n:]
		return int64(v)
	}
	c := &contents{}
	c.Margin = number(MaxSize)
	for range number(min(maxPacks, uint64(len(b)))) {
		layer := uint64(number(math.MaxUint64))
		if n := len(c.packs); n > 0 && c.packs[n-1] >= layer {
			return nil, malformed("packs are not in order")
		}
		c.packs = append(c.packs, layer)
	}
	used := map[uint64]bool{}
	for range number(min(maxFiles, uint64(len(b)))) {
		at := number(maxPacks - 1)
		if bad || at >= int64(len(c.packs)) {
			return nil, malformed("a file is in no pack")
		}
		ref := pack.Ref{Layer: c.packs[at], Number: uint32(number(math.MaxUint32))}
		f := File{Redirect: ref.Redirect()}
		block := uint32(number(maxBlock))
		f.Size = number(MaxSize)
		last := int64(0)
		for range number(uint64(min(chunks(f.Size), int64(len(b))))) {
			gap, length := number(uint64(chunks(f.Size))), number(uint64(chunks(f.Size)))
			r := Range{Offset: last + gap*Chunk}
			r.Length = min(length*Chunk, f.Size-r.Offset)
			if last = r.Offset + length*Chunk; bad || r.Length <= 0 {
				return nil, malformed("a range of %s", f.Redirect)
			}
			f.Hot = append(f.Hot, r)
		}
		if bad || int64(block)+chunks(f.Size) > maxBlock {
			return nil, malformed("a number of %s", f.Redirect)
		}
		used[ref.Layer] = true
		c.Files, c.refs, c.blocks = append(c.Files, f), append(c.refs, ref), append(c.blocks, block)
	}
	if bad || len(b) > 0 {
		return nil, malformed("its length")
	}
	if len(used) != len(c.packs) {
		return nil, malformed("a pack has no files")
	}
	if err := c.check(); err != nil {
		return nil, malformed("%s", err)
	}
	return c, nil
}

// maxBlock is the last block that can be addressed; the one behind it means a hole.
const maxBlock = erofs.NullAddr - 1

func malformed(format string, args ...any) error {
	return fmt.Errorf("the list of files is malformed: "+format+": %w", append(args, errdefs.ErrDataLoss)...)
}

// Read returns what the image at path divides. Superblock, metadata and list are checked by their
// checksums and the whole by its size; hot chunks are not read: [Verify] does. The error is of class errdefs.ErrDataLoss if
// the file is cut off or damaged, errdefs.ErrFailedPrecondition if another version wrote it, errdefs.ErrInvalidArgument if
// it is something else.
func Read(path string) (Set, error) {
	f, err := os.Open(path)
	if err != nil {
		return Set{}, fmt.Errorf("open parts image: %w", err)
	}
	defer f.Close()
	c, err := readFrom(f)
	if err != nil {
		return Set{}, err
	}
	return c.Set, nil
}

func readFrom(f *os.File) (*contents, error) {
	path := f.Name()
	image, err := erofs.CheckSuper(f, "parts", volumeName)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("stat parts image %q: %w", path, err)
	}
	damaged := func(what string) error {
		return fmt.Errorf("parts image %q is damaged: %s: %w", path, what, errdefs.ErrDataLoss)
	}
	var footer [footerSize]byte
	if st.Size() < image+footerSize {
		return nil, damaged("it is cut off")
	}
	if _, err := f.ReadAt(footer[:], st.Size()-footerSize); err != nil {
		return nil, fmt.Errorf("read parts image %q: %w", path, err)
	}
	list, meta := int64(binary.LittleEndian.Uint64(footer[8:])), int64(binary.LittleEndian.Uint64(footer[16:]))
	if string(footer[:8]) != footerMagic || list < 0 || list > maxList || st.Size() != image+list+footerSize || meta < 0 || meta > image {
		return nil, damaged("its footer does not fit it")
	}
	b := make([]byte, list)
	if _, err := f.ReadAt(b, image); err != nil {
		return nil, fmt.Errorf("read parts image %q: %w", path, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, meta)); err != nil {
		return nil, fmt.Errorf("read parts image %q: %w", path, err)
	}
	h.Write(b)
	h.Write(footer[:footerSize-sha256.Size])
	if string(h.Sum(nil)) != string(footer[footerSize-sha256.Size:]) {
		return nil, damaged("the checksum of its metadata does not match")
	}
	c, err := parseList(b)
	if err != nil {
		return nil, fmt.Errorf("parts image %q: %w", path, err)
	}
	return c, nil
}
