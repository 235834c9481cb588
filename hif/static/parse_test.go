// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// ldCache makes a cache as ldconfig does, without hwcaps.
func ldCache(libs map[string]string) []byte {
	const header, entry = 48, 24
	le := binary.LittleEndian
	b := make([]byte, header+entry*len(libs))
	copy(b, cacheMagic)
	le.PutUint32(b[20:], uint32(len(libs)))
	b[28] = 2
	i := 0
	for name, path := range libs {
		e := header + i*entry
		le.PutUint32(b[e:], 0x303)
		le.PutUint32(b[e+4:], uint32(len(b)))
		b = append(append(b, name...), 0)
		le.PutUint32(b[e+8:], uint32(len(b)))
		b = append(append(b, path...), 0)
		i++
	}
	return b
}

func TestLDCache(t *testing.T) {
	cache := ldCache(map[string]string{"liba.so": "/opt/liba.so", "bad": "relative"})
	require.Equal(t, map[string][]cacheEntry{"liba.so": {{path: "/opt/liba.so"}}}, parseLDCache(cache))
	require.Equal(t, parseLDCache(cache), parseLDCache(append([]byte("ld.so-1.7.0\x00 an old cache before"), cache...)))
	require.Empty(t, parseLDCache(cache[:60]))
	require.Empty(t, parseLDCache(nil))
	// The machine's own, which ldconfig wrote.
	if data, err := os.ReadFile("/etc/ld.so.cache"); err == nil {
		require.NotEmpty(t, parseLDCache(data)["libc.so.6"])
	}
}

func jarFile(t require.TestingT, manifest string) []byte {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	w, err := z.Create("META-INF/MANIFEST.MF")
	require.NoError(t, err)
	_, err = w.Write([]byte(manifest))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}

func TestJars(t *testing.T) {
	main := string(jarFile(t, "Manifest-Version: 1.0\r\nClass-Path: lib/a.jar li\r\n b/b.jar\r\nMain-Class: x\r\n"))
	root := tree(map[string]string{
		"jvm/bin/java": program(), "jvm/lib/jvm.cfg": "x", "jvm/lib/modules": "x", "jvm/lib/server/libjvm.so": library("libjvm.so"), "jvm/lib/server/classes.jsa": "x",
		"jvm/conf/security/java.security": "x", "usr/bin/java": "-> /jvm/bin/java", "app/main.jar": main, "app/lib/a.jar": "no jar", "app/lib/b.jar": main, "app/lib/c.jar": "x",
	})
	require.ElementsMatch(t, []string{
		"jvm/bin/java", "jvm/lib/jvm.cfg", "jvm/lib/server/libjvm.so", "jvm/lib/server/classes.jsa", "jvm/lib/modules", "jvm/conf/security/java.security",
		"app/main.jar", "app/lib/a.jar", "app/lib/b.jar",
	}, predict(t, root, v1.ImageConfig{Entrypoint: []string{"java", "-Xmx1g", "-jar", "/app/main.jar"}}))
	require.Contains(t, predict(t, root, v1.ImageConfig{Entrypoint: []string{"java", "-cp", "/app/lib/*:/none", "Main"}}), "app/lib/c.jar")
	require.NotContains(t, predict(t, root, v1.ImageConfig{Entrypoint: []string{"java", "-version"}}), "jvm/conf/security/java.security")
}

func FuzzELF(f *testing.F) {
	f.Add(elfFile{interp: ld, needed: []string{"a", "b"}, rpath: "$ORIGIN", soname: "x"}.bytes())
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := parseELF(bytes.NewReader(data))
		if err == nil && len(o.needed) > maxNeeded {
			t.Fatal("unbounded")
		}
	})
}

func FuzzLDCache(f *testing.F) {
	f.Add(ldCache(map[string]string{"liba.so": "/opt/liba.so"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, entries := range parseLDCache(data) {
			for _, e := range entries {
				if e.path[0] != '/' {
					t.Fatal("relative path")
				}
			}
		}
	})
}

func FuzzJar(f *testing.F) {
	f.Add(jarFile(f, "Class-Path: a.jar b.jar\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(jarClassPath(bytes.NewReader(data), int64(len(data)))) > 2_000 {
			t.Fatal("unbounded")
		}
		manifestClassPath(data)
	})
}

// FuzzScripts runs a text through everything that reads texts, as the command of an image.
func FuzzScripts(f *testing.F) {
	for _, seed := range []string{
		"#!/bin/sh\nset -e\nif [ \"$1\" = x ]; then a; elif b; else c; fi; case $x in a|b) d;; *) e;; esac\nfor i in a; do f; done; exec \"$@\" <<EOF\nx\nEOF\n",
		"import a, b.c\nfrom . import x as y\ntry:\n    import q\nexcept ImportError:\n    import r\ndef f():\n  import s\n\"\"\" long\n",
		"const a = require('a'); function f() { require(\"./b\") } /* x */ import 'c' // d\n`${x}`",
		"require 'a'\ndef x\n require_relative 'b'\nend\n", "use strict;\nuse parent qw(A::B C);\n=pod\n=cut\nrequire X;\n__END__\n",
		"<?php require_once __DIR__ . '/a.php'; include('b.php');", "[x]\ninclude a*\nextension=b\n", "$(`${", "\"$(( $( ` ", "#!",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		files := map[string]string{"app": text, "etc/nginx/nginx.conf": text, "etc/ld.so.conf": text, "etc/ld.so.preload": text, "etc/nsswitch.conf": text}
		for _, p := range []string{"sh", "python3.11", "node", "ruby3.1", "perl", "php8.2", "nginx", "env"} {
			files["bin/"+p] = program("libc.so.6")
		}
		files["lib/python3.11/os.py"], files["lib/ruby/3.1.0/x.rb"], files["etc/php/8.2/cli/php.ini"] = text, text, text
		root := tree(files)
		for _, argv := range [][]string{
			{"/app", "x"}, {"sh", "/app", "x"}, {"sh", "-c", text}, {"python3.11", "/app"}, {"node", "/app"}, {"ruby3.1", "/app"}, {"perl", "/app"}, {"php8.2", "/app"}, {"nginx"}, {"env", text},
		} {
			if _, err := Analyze(t.Context(), root, v1.ImageConfig{Cmd: argv}, Options{}); err != nil && !errors.Is(err, ErrIncomplete) {
				t.Fatal(err)
			}
		}
		stepKind(text, false)
	})
}
