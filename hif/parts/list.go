// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Behind the EROFS image, in the same file, stand the list of its files and a footer. So the two are one rename, and the
// list of devices cannot be that of another image.
//
//	list     u margin | u files | file*        u is an unsigned varint
//	file     u length, redirect | u size | u ranges | (u chunks from the last end, u chunks)*
//	footer   "nhybprt2" | list bytes, 8 | metadata bytes, 8 | SHA-256 of metadata, list, and the footer before it
const (
	footerMagic = "nhybprt2"
	footerSize  = 8 + 8 + 8 + sha256.Size
	// maxList bounds what is read into memory: a list of maxDevices files with long paths is smaller.
	maxList = 64 << 20
)

func appendList(b []byte, s Set) []byte {
	b = binary.AppendUvarint(b, uint64(s.Margin))
	b = binary.AppendUvarint(b, uint64(len(s.Files)))
	for _, f := range s.Files {
		b = binary.AppendUvarint(b, uint64(len(f.Redirect)))
		b = append(b, f.Redirect...)
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

// parseList is the reverse of appendList. The result passes check.
func parseList(b []byte) (s Set, err error) {
	bad := false
	number := func(limit int64) int64 {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > uint64(limit) {
			bad = true
			return 0
		}
		b = b[n:]
		return int64(v)
	}
	s.Margin = number(MaxSize)
	for range number(min(maxDevices, int64(len(b)))) {
		n := number(int64(min(maxPath, len(b))))
		if bad || n > int64(len(b)) {
			return Set{}, malformed("a redirect is cut off")
		}
		f := File{Redirect: string(b[:n])}
		b = b[n:]
		f.Size = number(MaxSize)
		last := int64(0)
		for range number(min(chunks(f.Size), int64(len(b)))) {
			gap, length := number(chunks(f.Size)), number(chunks(f.Size))
			r := Range{Offset: last + gap*Chunk}
			r.Length = min(length*Chunk, f.Size-r.Offset)
			if last = r.Offset + length*Chunk; bad || r.Length <= 0 {
				return Set{}, malformed("a range of %.80q", f.Redirect)
			}
			f.Hot = append(f.Hot, r)
		}
		if bad {
			return Set{}, malformed("a number of %.80q", f.Redirect)
		}
		s.Files = append(s.Files, f)
	}
	if bad || len(b) > 0 {
		return Set{}, malformed("its length")
	}
	if err := s.check(); err != nil {
		return Set{}, malformed("%s", err)
	}
	return s, nil
}

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
	return readFrom(f)
}

func readFrom(f *os.File) (Set, error) {
	path := f.Name()
	image, err := erofs.CheckSuper(f, "parts", volumeName)
	if err != nil {
		return Set{}, err
	}
	st, err := f.Stat()
	if err != nil {
		return Set{}, fmt.Errorf("stat parts image %q: %w", path, err)
	}
	damaged := func(what string) error {
		return fmt.Errorf("parts image %q is damaged: %s: %w", path, what, errdefs.ErrDataLoss)
	}
	var footer [footerSize]byte
	if st.Size() < image+footerSize {
		return Set{}, damaged("it is cut off")
	}
	if _, err := f.ReadAt(footer[:], st.Size()-footerSize); err != nil {
		return Set{}, fmt.Errorf("read parts image %q: %w", path, err)
	}
	list, meta := int64(binary.LittleEndian.Uint64(footer[8:])), int64(binary.LittleEndian.Uint64(footer[16:]))
	if string(footer[:8]) != footerMagic || list < 0 || list > maxList || st.Size() != image+list+footerSize || meta < 0 || meta > image {
		return Set{}, damaged("its footer does not fit it")
	}
	b := make([]byte, list)
	if _, err := f.ReadAt(b, image); err != nil {
		return Set{}, fmt.Errorf("read parts image %q: %w", path, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, meta)); err != nil {
		return Set{}, fmt.Errorf("read parts image %q: %w", path, err)
	}
	h.Write(b)
	h.Write(footer[:footerSize-sha256.Size])
	if string(h.Sum(nil)) != string(footer[footerSize-sha256.Size:]) {
		return Set{}, damaged("the checksum of its metadata does not match")
	}
	set, err := parseList(b)
	if err != nil {
		return Set{}, fmt.Errorf("parts image %q: %w", path, err)
	}
	return set, nil
}
