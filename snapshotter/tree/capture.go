// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
)

// Capture reads the metadata of the layer in dir and writes it to w, without seeking or syncing. dir is an unpacked
// layer or an upper directory of overlayfs; nobody may write to it meanwhile. Its whiteouts are char devices 0:0, or
// empty files with trusted.overlay.whiteout in directories with trusted.overlay.opaque=x.
//
// layerID is the first component of the redirects. parent is the chain below. It may be nil unless dir holds files
// without data (metacopy) or renamed lower directories (redirect), which are resolved against it; without it, or where
// it does not hold what they need, the error is of class errdefs.ErrFailedPrecondition.
// What a tree cannot hold (an xattr of exactly 64 KiB, a path beyond 64 KiB) is errdefs.ErrInvalidArgument.
//
// Memory is some 40 bytes for each name and the names themselves.
func Capture(ctx context.Context, dir, layerID string, parent Chain, w io.Writer) (Stats, error) {
	if err := checkLayerID(layerID); err != nil {
		return Stats{}, fmt.Errorf("capture %q: %w", dir, err)
	}
	root, walked, attrs, err := walk(ctx, dir, len(layerID))
	if err != nil {
		return Stats{}, fmt.Errorf("capture layer %s: %w", layerID, err)
	}
	c := &capture{
		ctx: ctx, id: layerID, w: w, hash: sha256.New(), stats: walked.stats,
		first: map[fileID]int{}, seen: map[fileID]bool{},
	}
	if walked.lookups {
		if c.lower, err = findLower(ctx, parent, root); err != nil {
			return Stats{}, fmt.Errorf("capture layer %s: %w", layerID, err)
		}
	}
	if err := c.write(root, attrs); err != nil {
		return Stats{}, fmt.Errorf("capture layer %s: %w", layerID, err)
	}
	return c.stats, nil
}

// fileID is st_dev and st_ino, or for inodes of lower layers ^0 and the number of the entry's inode.
type fileID struct{ dev, num uint64 }

// capture puts what the walk found into one stream.
type capture struct {
	ctx   context.Context
	id    string
	lower *lower // nil if nothing refers to the layers below
	w     io.Writer
	hash  hash.Hash
	buf   []byte
	off   int // bytes before buf
	err   error
	stats Stats
	first map[fileID]int // where the first name of an inode with several stands
	seen  map[fileID]bool
}

func (c *capture) write(root *dir, attrs *inode) error {
	c.buf = appendHeader(c.buf, c.id)
	flags := inodeFlags(attrs)
	if root.attr.opaque {
		flags |= flagOpaque
	}
	c.buf = appendInode(appendName(c.buf, 0, flags, ""), attrs)
	c.dir(root)
	if c.flush(); c.err != nil {
		return c.err
	}
	return writeTrailer(c.w, &c.stats, c.hash)
}

func (c *capture) flush() {
	if c.err == nil {
		c.err = c.ctx.Err()
	}
	if c.err == nil {
		c.hash.Write(c.buf)
		_, c.err = c.w.Write(c.buf)
	}
	c.off += len(c.buf)
	c.buf = c.buf[:0]
}

// dir writes the entries of d in path order.
func (c *capture) dir(d *dir) {
	pos := 0
	for _, cut := range d.cuts {
		c.buf = append(c.buf, d.buf[pos:cut.off]...)
		pos = cut.off
		if cut.child != nil {
			c.child(cut.child)
		} else {
			c.late(d, cut.late)
		}
		if len(c.buf) > 1<<20 {
			c.flush()
		}
		if c.err != nil {
			return
		}
	}
	c.buf = append(c.buf, d.buf[pos:]...)
	d.buf, d.cuts = nil, nil
}

// child writes the contents of a directory whose own entry is written.
func (c *capture) child(d *dir) {
	if d.attr.redirect != "" {
		c.merged(d, c.lower.dirOf(d))
		return
	}
	c.dir(d)
}

// late writes a file whose record had to wait.
func (c *capture) late(d *dir, l *late) {
	id := fileID{l.dev, l.num}
	if !l.single && !c.seen[id] {
		c.seen[id] = true
		c.stats.Inodes++
		c.stats.Bytes += l.blocks * 512
	}
	if l.whiteout {
		return
	}
	if !l.single && c.link(d.depth+1, id, l.name) {
		return
	}
	i := l.ino
	i.multi = !l.single
	switch {
	case l.metacopy:
		from, err := c.lower.fileOf(d, l)
		if err != nil {
			c.err = err
			return
		}
		i.redirect = from
	case i.hasData():
		i.redirect = fmt.Appendf(nil, "/%s/%s", c.id, l.name)
		if d.path != "" {
			i.redirect = fmt.Appendf(nil, "/%s/%s/%s", c.id, d.path, l.name)
		}
		c.stats.DataBytes += int64(i.size)
	}
	c.stats.Unreachable += unreachable(len(i.redirect))
	c.buf = appendInode(appendName(c.buf, d.depth+1, inodeFlags(&i), l.name), &i)
}

// link writes a further name of an inode; of the first one it only takes note.
func (c *capture) link(depth int, id fileID, name string) bool {
	first, found := c.first[id]
	if !found {
		c.first[id] = c.off + len(c.buf)
		return false
	}
	c.buf = appendName(c.buf, depth, flagLink, name)
	c.buf = binary.AppendUvarint(c.buf, uint64(first))
	return true
}
