// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// Marks of removal in a layer's tar (OCI image specification, "Representing Changes").
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// writeTree writes the upper directory of an overlay as the tar of a layer. lowers are the directories below, topmost
// first.
func writeTree(w io.Writer, upper string, lowers []string) error {
	t := &treeWriter{tar: tar.NewWriter(w), links: map[uint64]string{}, lowers: lowers}
	err := filepath.WalkDir(upper, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(upper, path)
		if err != nil || rel == "." {
			return err
		}
		if err := t.add(path, rel); err != nil {
			return fmt.Errorf("entry %q: %w", rel, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return t.tar.Close()
}

type treeWriter struct {
	tar    *tar.Writer
	links  map[uint64]string // inode to the name it was first written under
	lowers []string
}

func (t *treeWriter) add(path, rel string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("no stat")
	}
	if info.Mode()&os.ModeCharDevice != 0 && st.Rdev == 0 {
		return t.mark(filepath.Join(filepath.Dir(rel), whiteoutPrefix+filepath.Base(rel)))
	}
	if info.Mode()&os.ModeSocket != 0 {
		return nil // tar has none, and nobody listens in an image
	}
	var target string
	if info.Mode()&os.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Uname, h.Gname, h.Format = filepath.ToSlash(rel), "", "", tar.FormatPAX
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{} // they differ from run to run
	opaque, err := t.xattrs(h, path, info.IsDir())
	if err != nil {
		return err
	}
	if info.IsDir() {
		h.Name += "/"
	} else if st.Nlink > 1 {
		if first, ok := t.links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size, h.PAXRecords = tar.TypeLink, first, 0, nil
			return t.tar.WriteHeader(h)
		}
		t.links[st.Ino] = h.Name
	}
	if err := t.tar.WriteHeader(h); err != nil {
		return err
	}
	if opaque && t.hasLowerDir(rel) {
		return t.mark(filepath.Join(rel, opaqueName))
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(t.tar, f)
	return err
}

// mark writes a whiteout or an opaque mark.
func (t *treeWriter) mark(name string) error {
	return t.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: epoch, Format: tar.FormatPAX})
}

// xattrs copies extended attributes but for overlayfs's own, of which only opaque says something about the layer.
func (t *treeWriter) xattrs(h *tar.Header, path string, dir bool) (opaque bool, err error) {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("list xattrs: %w", err)
	}
	for _, name := range names {
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return false, fmt.Errorf("read xattr %q: %w", name, err)
		}
		if strings.HasPrefix(name, "trusted.overlay.") {
			opaque = opaque || dir && name == "trusted.overlay.opaque" && string(value) == "y"
			continue
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = string(value)
	}
	return opaque, nil
}

// hasLowerDir says if there is something for an opaque directory to hide: overlayfs marks every new directory.
func (t *treeWriter) hasLowerDir(rel string) bool {
	for _, lower := range t.lowers {
		if st, err := os.Lstat(filepath.Join(lower, rel)); err == nil {
			return st.IsDir()
		}
	}
	return false
}

// unpack applies entries to a directory as an overlay layer, for later steps to find them.
func unpack(ctx context.Context, tree string, entries []Entry) error {
	var b bytes.Buffer
	if err := writeTar(&b, entries); err != nil {
		return err
	}
	_, err := archive.Apply(ctx, tree, &b, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	return err
}
