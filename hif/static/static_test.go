// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// elfFile is a small ELF file of 64 bits for x86-64.
type elfFile struct {
	interp, soname, rpath, runpath string
	needed, imports                []string
}

func (f elfFile) bytes() []byte {
	table := []byte{0}
	str := func(s string) uint64 {
		at := uint64(len(table))
		table = append(append(table, s...), 0)
		return at
	}
	var dyn []elf.Dyn64
	add := func(tag elf.DynTag, s string) {
		if s != "" {
			dyn = append(dyn, elf.Dyn64{Tag: int64(tag), Val: str(s)})
		}
	}
	for _, n := range f.needed {
		add(elf.DT_NEEDED, n)
	}
	add(elf.DT_SONAME, f.soname)
	add(elf.DT_RPATH, f.rpath)
	add(elf.DT_RUNPATH, f.runpath)
	for _, n := range f.imports {
		str(n)
	}
	const head = 64 + 3*56
	interp := append([]byte(f.interp), 0)
	tableAt := uint64(head + len(interp))
	dynAt := tableAt + uint64(len(table))
	dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: 0x1000 + tableAt}, elf.Dyn64{Tag: int64(elf.DT_STRSZ), Val: uint64(len(table))}, elf.Dyn64{})
	end := dynAt + uint64(16*len(dyn))
	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Phentsize: 56, Phnum: 3, Ehsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	put(h)
	put(elf.Prog64{Type: uint32(elf.PT_LOAD), Vaddr: 0x1000, Filesz: end, Memsz: end})
	put(elf.Prog64{Type: uint32(elf.PT_DYNAMIC), Off: dynAt, Filesz: end - dynAt})
	kind := elf.PT_INTERP
	if f.interp == "" {
		kind = elf.PT_NULL
	}
	put(elf.Prog64{Type: uint32(kind), Off: head, Filesz: uint64(len(interp))})
	b.Write(interp)
	b.Write(table)
	put(dyn)
	return b.Bytes()
}

// tree makes a root filesystem: contents by name, "-> target" for links.
func tree(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, data := range files {
		if target, ok := strings.CutPrefix(data, "-> "); ok {
			m[name] = &fstest.MapFile{Mode: fs.ModeSymlink | 0o777, Data: []byte(target)}
		} else {
			m[name] = &fstest.MapFile{Mode: 0o755, Data: []byte(data)}
		}
	}
	return m
}

func predict(t *testing.T, root Root, config v1.ImageConfig) []string {
	t.Helper()
	files, err := Analyze(t.Context(), root, config, Options{HWCaps: []string{"x86-64-v3"}})
	require.NoError(t, err)
	var names []string
	for i, f := range files {
		require.Equal(t, i+1, f.Rank)
		require.NotEmpty(t, f.Reason)
		names = append(names, f.Path)
	}
	return names
}

const ld = "/lib64/ld-linux-x86-64.so.2"

func program(needed ...string) string {
	return string(elfFile{interp: ld, needed: needed}.bytes())
}

func library(soname string, needed ...string) string {
	return string(elfFile{soname: soname, needed: needed}.bytes())
}

func TestLinksAndPath(t *testing.T) {
	root := tree(map[string]string{
		"bin": "-> usr/bin", "usr/bin/app": "-> /opt/../opt/app/./run", "opt/app/run": program("libc.so.6"),
		"lib64": "-> /usr/lib64", "usr/lib64/ld-linux-x86-64.so.2": "-> ../lib/x86_64-linux-gnu/ld.so",
		"usr/lib/x86_64-linux-gnu/ld.so": library("ld-linux-x86-64.so.2"), "usr/lib/x86_64-linux-gnu/libc.so.6": library("libc.so.6"),
	})
	require.Equal(t, []string{"opt/app/run", "usr/lib/x86_64-linux-gnu/ld.so", "usr/lib/x86_64-linux-gnu/libc.so.6"},
		predict(t, root, v1.ImageConfig{Entrypoint: []string{"app"}, Env: []string{"PATH=/none:/bin"}}))
	require.Empty(t, predict(t, root, v1.ImageConfig{Cmd: []string{"app"}, Env: []string{"PATH=/none"}}))
}

func TestLibrarySearch(t *testing.T) {
	c := library("libc.so.6")
	for name, test := range map[string]struct {
		program string
		files   map[string]string
		env     []string
		want    string
	}{
		"the default directories": {program("liba.so"), map[string]string{"usr/lib/liba.so": c, "lib/x86_64-linux-gnu/liba.so": c}, nil, "lib/x86_64-linux-gnu/liba.so"},
		"LD_LIBRARY_PATH before":  {program("liba.so"), map[string]string{"usr/lib/liba.so": c, "opt/liba.so": c}, []string{"LD_LIBRARY_PATH=/opt"}, "opt/liba.so"},
		"RUNPATH after LD_LIBRARY_PATH": {string(elfFile{interp: ld, needed: []string{"liba.so"}, runpath: "$ORIGIN/../lib"}.bytes()),
			map[string]string{"app/lib/liba.so": c, "opt/liba.so": c}, []string{"LD_LIBRARY_PATH=/opt"}, "opt/liba.so"},
		"RPATH before LD_LIBRARY_PATH": {string(elfFile{interp: ld, needed: []string{"liba.so"}, rpath: "${ORIGIN}/../lib"}.bytes()),
			map[string]string{"app/lib/liba.so": c, "opt/liba.so": c}, []string{"LD_LIBRARY_PATH=/opt"}, "app/lib/liba.so"},
		"RUNPATH makes RPATH void": {string(elfFile{interp: ld, needed: []string{"liba.so"}, rpath: "/opt", runpath: "/run/x"}.bytes()),
			map[string]string{"usr/lib/liba.so": c, "opt/liba.so": c}, nil, "usr/lib/liba.so"},
		"a better processor":      {program("liba.so"), map[string]string{"usr/lib/liba.so": c, "usr/lib/glibc-hwcaps/x86-64-v3/liba.so": c}, nil, "usr/lib/glibc-hwcaps/x86-64-v3/liba.so"},
		"a processor not so good": {program("liba.so"), map[string]string{"usr/lib/liba.so": c, "usr/lib/glibc-hwcaps/x86-64-v4/liba.so": c}, nil, "usr/lib/liba.so"},
		"no library":              {program("liba.so"), map[string]string{"lib/liba.so": "GROUP ( libb.so )", "usr/lib/liba.so": c}, nil, "usr/lib/liba.so"},
		"ld.so.conf": {program("liba.so"), map[string]string{"etc/ld.so.conf": "include ld.so.conf.d/*.conf\n", "etc/ld.so.conf.d/a.conf": "# x\n/opt/x\n", "opt/x/liba.so": c},
			nil, "opt/x/liba.so"},
		"the cache": {program("liba.so"), map[string]string{"etc/ld.so.cache": string(ldCache(map[string]string{"liba.so": "/opt/y/liba.so"})), "opt/y/liba.so": c, "usr/lib/liba.so": c},
			nil, "opt/y/liba.so"},
		"musl": {string(elfFile{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"liba.so", "libc.so"}}.bytes()),
			map[string]string{"etc/ld-musl-x86_64.path": "/opt/m\n", "opt/m/liba.so": c, "opt/m/libc.so": c, "usr/lib/liba.so": c}, nil, "opt/m/liba.so"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"app/bin/app": test.program}
			for n, data := range test.files {
				files[n] = data
			}
			got := predict(t, tree(files), v1.ImageConfig{Cmd: []string{"/app/bin/app"}, Env: test.env})
			var libs []string
			for _, n := range got {
				if strings.Contains(n, "liba") || strings.Contains(n, "libc.so") {
					libs = append(libs, n)
				}
			}
			require.Equal(t, []string{test.want}, libs)
		})
	}
}

func TestClosureOfLibraries(t *testing.T) {
	root := tree(map[string]string{
		"app": program("liba.so"), "usr/lib/liba.so": library("liba.so", "libb.so", "libc.so"), "usr/lib/libb.so": "-> libb.so.1",
		"usr/lib/libb.so.1": library("libb.so", "liba.so", "libgone.so"), "usr/lib/libc.so": library("libc.so", "libc.so"),
	})
	require.Equal(t, []string{"app", "usr/lib/liba.so", "usr/lib/libb.so.1", "usr/lib/libc.so"}, predict(t, root, v1.ImageConfig{Cmd: []string{"/app"}}))
}

func TestInterpreters(t *testing.T) {
	root := tree(map[string]string{
		"usr/bin/env": program(), "usr/bin/tool": program(), "run": "#!/usr/bin/env -S A=1 tool --x\n", "run2": "#! /usr/bin/tool -f\n", "run3": "echo no shebang; . /lib/x\n",
		"bin/sh": program(), "lib/x": "tool\n", "loop": "#!/loop\n",
	})
	require.Equal(t, []string{"run", "usr/bin/env", "usr/bin/tool"}, predict(t, root, v1.ImageConfig{Entrypoint: []string{"/run"}}))
	require.Equal(t, []string{"run2", "usr/bin/tool"}, predict(t, root, v1.ImageConfig{Entrypoint: []string{"/run2"}}))
	require.Equal(t, []string{"run3", "bin/sh", "lib/x", "usr/bin/tool"}, predict(t, root, v1.ImageConfig{Entrypoint: []string{"/run3"}}))
	require.Equal(t, []string{"loop"}, predict(t, root, v1.ImageConfig{Entrypoint: []string{"/loop"}}))
}

func TestStaticProgram(t *testing.T) {
	root := tree(map[string]string{
		"server": string(elfFile{}.bytes()) + strings.Repeat("x", 1<<20-30) + "/etc/passwd/etc/ssl/certs/ca-certificates.crt", "etc/passwd": "root",
		"etc/ssl/certs/ca-certificates.crt": "x", "etc/group": "not named", "config.yml": "x", "other": "x",
	})
	require.Equal(t, []string{"server", "etc/passwd", "etc/ssl/certs/ca-certificates.crt", "config.yml"},
		predict(t, root, v1.ImageConfig{Entrypoint: []string{"/server", "--config=/config.yml"}}))
}

func TestWhatRuntimesMountIsNoFileOfTheImage(t *testing.T) {
	root := tree(map[string]string{"bin/app": program(), "etc/resolv.conf": "x", "etc/hosts": "x", "proc/x": "x", "dev/y": "x"})
	require.Equal(t, []string{"bin/app"}, predict(t, root, v1.ImageConfig{Cmd: []string{"/bin/app", "/etc/resolv.conf", "/etc/hosts", "/proc/x", "/dev/y"}}))
}

func TestLimits(t *testing.T) {
	files := map[string]string{"bin/sh": program(), "app": "#!/bin/sh\n"}
	for _, c := range "abcdefghij" {
		files["bin/"+string(c)] = program()
		files["app"] += string(c) + "\n"
	}
	config := v1.ImageConfig{Cmd: []string{"/app"}}
	for _, o := range []Options{{MaxFiles: 5}, {MaxBytes: 300}, {MaxLookups: 10}} {
		some, err := Analyze(t.Context(), tree(files), config, o)
		require.ErrorIs(t, err, ErrIncomplete)
		require.NotEmpty(t, some)
		require.Less(t, len(some), 12)
	}
	all, err := Analyze(t.Context(), tree(files), config, Options{})
	require.NoError(t, err)
	require.Len(t, all, 12)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Analyze(ctx, tree(files), config, Options{})
	require.ErrorIs(t, err, context.Canceled)
}

func TestScore(t *testing.T) {
	p, r := Score([]string{"a", "b", "b", "c"}, []string{"a", "b", "d", "e", "e"})
	require.InDelta(t, 2.0/3, p, 1e-9)
	require.InDelta(t, 2.0/4, r, 1e-9)
	p, r = Score(nil, []string{"a"})
	require.Equal(t, []float64{1, 0}, []float64{p, r})
}
