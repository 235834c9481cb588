// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"

	// nodeCost is what a name with its inode takes in memory, in bytes.
	nodeCost = 256
)

// applier applies the entries of one tar to a tree, step by step as containerd's
// archive.Apply does with OverlayConvertWhiteout on an empty upper directory.
// Where the steps look odd, the comments there say which system call they stand
// for.
type applier struct {
	ctx  context.Context
	opts Options
	tree *tree
	data *dataWriter
	// dirs are the directories that were listed, in order: their times are set
	// at the end, by name.
	dirs    []dirTime
	last    lastDir
	entries int64
	cost    int64 // estimated bytes of memory, see Options.MaxMetadata
}

// lastDir is the directory of the last entry: most entries stand in that of the one before them. It holds until
// something is removed from the tree: all of its path exists, and what is added changes nothing of that.
type lastDir struct {
	name    string // as the tar has it
	path    string // symlinks resolved
	node    *pack.Node
	removed int // tree.removed then
}

type dirTime struct {
	path  string
	mtime time.Time
}

func newApplier(ctx context.Context, p Pack, opts Options) *applier {
	a := &applier{ctx: ctx, opts: opts, data: newDataWriter(ctx, p, opts)}
	a.tree = newTree(func(i *pack.Inode) { a.data.drop(i.Data.Number) })
	a.data.text = &a.tree.text
	return a
}

// run reads a tar to its end.
func (a *applier) run(r io.Reader) error {
	tr := newTarReader(r)
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read entry %d of the tar: %w: %w", a.entries+1, err, errdefs.ErrInvalidArgument)
		}
		a.entries++
		if err := a.entry(hdr, tr); err != nil {
			return fmt.Errorf("entry %.300q: %w", hdr.Name, err)
		}
	}
	for _, d := range a.dirs {
		if err := a.setDirTime(d); err != nil {
			return fmt.Errorf("set the time of directory %.300q: %w", d.path, err)
		}
	}
	return nil
}

// result is valid after run.
func (a *applier) result() (*pack.Meta, Result) {
	d := a.data
	return &pack.Meta{Layer: a.opts.Layer, Root: a.tree.finish(), Numbers: d.numbers},
		Result{Entries: a.entries, Files: d.files, DataBytes: d.bytes, NVMBytes: d.nvmBytes, Holes: d.holes, NVMError: d.nvmErr}
}

// bad says why an entry cannot be applied.
func bad(err error) error { return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument) }

// spend accounts for n bytes of memory that stay.
func (a *applier) spend(n int) error {
	if a.cost += int64(n); a.cost > a.opts.MaxMetadata {
		return bad(fmt.Errorf("names and attributes take more than %d bytes", a.opts.MaxMetadata))
	}
	return nil
}

func (a *applier) entry(hdr *tar.Header, r io.Reader) error {
	name := path.Clean(hdr.Name)
	dirName, base := path.Split(name)
	// The base is joined to the root: of "." and ".." nothing is left.
	if base == "." || base == ".." {
		base = ""
	}
	dir, dirPath, err := a.parent(dirName, base)
	if dir == nil || err != nil {
		return err
	}
	if base == whiteoutOpaque {
		dir.Inode.Opaque = true
		return nil
	}
	hidden, whiteout := strings.CutPrefix(base, whiteoutPrefix)
	if len(strings.TrimSuffix(dirPath, "/"))+1+len(hidden) > maxPath || len(hidden) > maxName {
		return bad(unix.ENAMETOOLONG)
	}
	if whiteout {
		if err := a.whiteout(dir, hidden); err != nil {
			return bad(err)
		}
		return nil
	}
	base = a.tree.text.clone(base)
	if n := a.tree.child(dir, base); n != nil && (!n.Dir() || hdr.Typeflag != tar.TypeDir) {
		a.tree.remove(dir, n)
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	n, err := a.create(dir, base, dirPath, hdr, r)
	if err != nil {
		return err
	}
	i := n.Inode
	if i == nil {
		i = &pack.Inode{Mode: unix.S_IFCHR} // nobody sees attributes of a whiteout, but they may be errors
	}
	if err := a.setAttributes(i, hdr); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeDir {
		a.dirs = append(a.dirs, dirTime{strings.Clone(name), hdr.ModTime})
		return a.spend(len(name) + 64)
	}
	return nil
}

// parent returns the directory of an entry called base, made where it does not exist, and its path. It is nil for the
// root, which is in no directory.
func (a *applier) parent(name, base string) (*pack.Node, string, error) {
	l := &a.last
	if l.node != nil && l.name == name && l.removed == a.tree.removed && base != "" {
		return l.node, l.path, a.spend(nodeCost + len(l.path) + len(base))
	}
	dirPath, err := a.tree.rootPath(name)
	if err != nil {
		return nil, "", bad(err)
	}
	if base == "" {
		if dirPath == "/" {
			return nil, "", nil
		}
		return nil, "", bad(errors.New("no name"))
	}
	// The directories above it that do not exist yet, at most.
	if err := a.spend(nodeCost + len(dirPath) + len(base) + nodeCost*a.missing(dirPath)); err != nil {
		return nil, "", err
	}
	dir, err := a.tree.mkparent(dirPath)
	if err != nil {
		return nil, "", bad(fmt.Errorf("make directory %.300q: %w", dirPath, err))
	}
	*l = lastDir{strings.Clone(name), dirPath, dir, a.tree.removed}
	return dir, dirPath, nil
}

// missing returns how many directories mkparent would make.
func (a *applier) missing(dirPath string) int {
	n := a.tree.root
	for name, rest := next(dirPath); name != ""; name, rest = next(rest) {
		if n = a.tree.child(n, name); n == nil {
			return strings.Count(rest, "/") + 2
		}
	}
	return 0
}

// whiteout makes a whiteout. As mknod does, it fails where the name exists.
func (a *applier) whiteout(dir *pack.Node, name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("whiteout of %q", name)
	case a.tree.child(dir, name) != nil:
		return fmt.Errorf("whiteout of a name of the layer itself: %w", unix.EEXIST)
	}
	n := a.tree.nodes.take()
	n.Name = a.tree.text.clone(name)
	a.tree.add(dir, n)
	return nil
}

// create makes the name, and its inode where that is a new one.
func (a *applier) create(dir *pack.Node, base, dirPath string, hdr *tar.Header, r io.Reader) (*pack.Node, error) {
	if hdr.Typeflag == tar.TypeDir {
		if n := a.tree.child(dir, base); n != nil {
			n.Inode.Implied = false
			return n, nil
		}
	}
	n := a.tree.nodes.take()
	n.Name = base
	if hdr.Typeflag == tar.TypeLink {
		target, err := a.linkTarget(hdr.Linkname)
		if err != nil {
			return nil, bad(fmt.Errorf("link to %.300q: %w", hdr.Linkname, err))
		}
		n.Inode = target.Inode
		a.tree.add(dir, n)
		return n, nil
	}
	i := a.tree.inodes.take()
	switch hdr.Typeflag {
	case tar.TypeDir:
		i.Mode = unix.S_IFDIR
	case tar.TypeReg:
		i.Mode = unix.S_IFREG
		if err := a.data.write(i, dirPath, base, hdr, r); err != nil {
			return nil, err
		}
		if err := a.spend(len(i.Inline)); err != nil {
			return nil, err
		}
	case tar.TypeSymlink:
		switch {
		case hdr.Linkname == "":
			return nil, bad(fmt.Errorf("symlink to nothing: %w", unix.ENOENT))
		case len(hdr.Linkname) > maxPath:
			return nil, bad(fmt.Errorf("symlink: %w", unix.ENAMETOOLONG))
		}
		i.Mode, i.Inline = unix.S_IFLNK|0o777, a.tree.text.clone(hdr.Linkname)
		if err := a.spend(len(i.Inline)); err != nil {
			return nil, err
		}
	case tar.TypeFifo:
		i.Mode = unix.S_IFIFO
	case tar.TypeBlock:
		i.Mode, i.Rdev = unix.S_IFBLK, device(hdr)
	case tar.TypeChar:
		i.Mode, i.Rdev = unix.S_IFCHR, device(hdr)
		if i.Rdev == 0 {
			i = nil // overlayfs takes it for a whiteout
		}
	default:
		return nil, bad(fmt.Errorf("type %q of the entry is not supported", hdr.Typeflag))
	}
	if i != nil {
		inherit(dir.Inode, i)
	}
	n.Inode = i
	a.tree.add(dir, n)
	return n, nil
}

// device returns the device number that mknod makes of an entry's: Linux has 12
// bits for the major number and 20 for the minor.
func device(hdr *tar.Header) uint64 {
	return unix.Mkdev(uint32(hdr.Devmajor)&0xfff, uint32(hdr.Devminor)&0xfffff)
}

// linkTarget returns what a hard link names. It may be a symlink or a whiteout.
func (a *applier) linkTarget(name string) (*pack.Node, error) {
	dirName, base := path.Split(name)
	dirPath, err := a.tree.rootPath(dirName)
	if err != nil {
		return nil, err
	}
	n, err := a.tree.lstat(path.Join(dirPath, base))
	if err != nil {
		return nil, err
	}
	if n.Dir() {
		return nil, unix.EPERM
	}
	return n, nil
}

func (a *applier) setDirTime(d dirTime) error {
	// In the end another file may stand there, or the path lead elsewhere.
	p, err := a.tree.rootPath(d.path)
	if err != nil {
		return bad(err)
	}
	n, err := a.tree.lstat(p)
	if err != nil {
		return bad(err)
	}
	if n.Inode != nil {
		setTime(n.Inode, d.mtime)
	}
	return nil
}
