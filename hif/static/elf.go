// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
)

// object is what the kernel and the dynamic linker read of an ELF file.
type object struct {
	class   elf.Class
	machine elf.Machine
	interp  string
	soname  string
	needed  []string
	rpath   string
	runpath string
	// strings is the dynamic string table: it holds, among others, the names of the functions that are imported.
	strings []byte
}

// has says if a name is in the dynamic string table.
func (o *object) has(name string) bool {
	return bytes.Contains(o.strings, append(append([]byte{0}, name...), 0))
}

func (o *object) hasAny(names ...string) bool {
	for _, n := range names {
		if o.has(n) {
			return true
		}
	}
	return false
}

// Bounds of what is read of one ELF file. The largest string table met, that of libnode, has 6 MiB.
const (
	maxProgs      = 512
	maxDynamic    = 1 << 16
	maxDynStrings = 16 << 20
	maxNeeded     = 1024
)

var errNoELF = errors.New("not an ELF file that could be read")

// parseELF reads an ELF file by its program headers, as the kernel and ld.so do: section headers may be missing or lie.
// Package debug/elf is made for trusted files and promises no bounds, so only its constants and layouts are used.
func parseELF(r io.ReaderAt) (*object, error) {
	ident := make([]byte, elf.EI_NIDENT)
	if _, err := r.ReadAt(ident, 0); err != nil || string(ident[:4]) != elf.ELFMAG {
		return nil, errNoELF
	}
	o := &object{class: elf.Class(ident[elf.EI_CLASS])}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(ident[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	progs, err := o.programs(r, order)
	if err != nil {
		return nil, err
	}
	for _, p := range progs {
		const maxInterp = 4096
		switch elf.ProgType(p.Type) {
		case elf.PT_INTERP:
			if p.Filesz == 0 || p.Filesz > maxInterp {
				return nil, errNoELF
			}
			b, err := part(r, p.Off, p.Filesz)
			if err != nil {
				return nil, err
			}
			o.interp = text(b, 0)
		case elf.PT_DYNAMIC:
			if err := o.dynamic(r, order, p, progs); err != nil {
				return nil, err
			}
		}
	}
	return o, nil
}

// programs reads the program headers, those of 32 bits widened.
func (o *object) programs(r io.ReaderAt, order binary.ByteOrder) ([]elf.Prog64, error) {
	var off uint64
	var size, n uint16
	wide := o.class == elf.ELFCLASS64
	switch {
	case wide:
		var h elf.Header64
		if read(r, order, 0, &h) != nil {
			return nil, errNoELF
		}
		o.machine, off, size, n = elf.Machine(h.Machine), h.Phoff, h.Phentsize, h.Phnum
	case o.class == elf.ELFCLASS32:
		var h elf.Header32
		if read(r, order, 0, &h) != nil {
			return nil, errNoELF
		}
		o.machine, off, size, n = elf.Machine(h.Machine), uint64(h.Phoff), h.Phentsize, h.Phnum
	default:
		return nil, errNoELF
	}
	progs := make([]elf.Prog64, min(int(n), maxProgs))
	for i := range progs {
		at := off + uint64(i)*uint64(size)
		if wide {
			if read(r, order, at, &progs[i]) != nil {
				return nil, errNoELF
			}
			continue
		}
		var p elf.Prog32
		if read(r, order, at, &p) != nil {
			return nil, errNoELF
		}
		progs[i] = elf.Prog64{
			Type: p.Type, Flags: p.Flags, Off: uint64(p.Off), Vaddr: uint64(p.Vaddr), Filesz: uint64(p.Filesz), Memsz: uint64(p.Memsz),
		}
	}
	return progs, nil
}

// dynamic reads the dynamic section: first where its strings are, then what refers to them.
func (o *object) dynamic(r io.ReaderAt, order binary.ByteOrder, p elf.Prog64, progs []elf.Prog64) error {
	b, err := part(r, p.Off, min(p.Filesz, maxDynamic))
	if err != nil {
		return err
	}
	type entry struct {
		tag elf.DynTag
		val uint64
	}
	var entries []entry
	size := 8
	if o.class == elf.ELFCLASS64 {
		size = 16
	}
	var table, length uint64
	for ; len(b) >= size; b = b[size:] {
		var e entry
		if size == 16 {
			e = entry{elf.DynTag(order.Uint64(b)), order.Uint64(b[8:])}
		} else {
			e = entry{elf.DynTag(order.Uint32(b)), uint64(order.Uint32(b[4:]))}
		}
		switch e.tag {
		case elf.DT_NULL:
			b = nil
		case elf.DT_STRTAB:
			table = e.val
		case elf.DT_STRSZ:
			length = e.val
		default:
			entries = append(entries, e)
		}
		if b == nil {
			break
		}
	}
	if length == 0 || length > maxDynStrings {
		return nil
	}
	// DT_STRTAB is an address of memory.
	for _, l := range progs {
		if elf.ProgType(l.Type) == elf.PT_LOAD && table >= l.Vaddr && table-l.Vaddr < l.Filesz {
			if o.strings, err = part(r, table-l.Vaddr+l.Off, min(length, l.Filesz-(table-l.Vaddr))); err != nil {
				return err
			}
			break
		}
	}
	for _, e := range entries {
		s := text(o.strings, e.val)
		switch e.tag {
		case elf.DT_NEEDED:
			if len(o.needed) < maxNeeded && s != "" {
				o.needed = append(o.needed, s)
			}
		case elf.DT_SONAME:
			o.soname = s
		case elf.DT_RPATH:
			o.rpath = s
		case elf.DT_RUNPATH:
			o.runpath = s
		}
	}
	return nil
}

// read fills a structure of fixed size from an offset.
func read(r io.ReaderAt, order binary.ByteOrder, off uint64, v any) error {
	b, err := part(r, off, uint64(binary.Size(v)))
	if err != nil {
		return err
	}
	_, err = binary.Decode(b, order, v)
	return err
}

// part reads n bytes, of which the caller has bounded the number, in steps: a claim of size is not worth an allocation.
func part(r io.ReaderAt, off, n uint64) ([]byte, error) {
	const step = 1 << 20
	if off > 1<<62 {
		return nil, errNoELF
	}
	var b []byte
	for n > 0 {
		k := min(n, step)
		b = append(b, make([]byte, k)...)
		if _, err := r.ReadAt(b[uint64(len(b))-k:], int64(off)+int64(len(b))-int64(k)); err != nil {
			return nil, errNoELF
		}
		n -= k
	}
	return b, nil
}

// text is the string that begins at an offset of a table.
func text(table []byte, off uint64) string {
	if off >= uint64(len(table)) {
		return ""
	}
	s, _, _ := bytes.Cut(table[off:], []byte{0})
	return string(s)
}
