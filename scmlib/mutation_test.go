// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/internal/crash"
)

// sites lists every flush, fence and checksum in the library's source: what the mutants leave out. Regions' fence passes the memory's on, so its
// callers count.
func sites(t *testing.T) []crash.Site {
	t.Helper()
	var out []crash.Site
	fset := token.NewFileSet()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "internal/persist/mem.go") // for CopyNT, which flushes
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Name.Name == "fence" || name == "internal/persist/mem.go" && fn.Name.Name != "CopyNT" {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok {
					op := map[string]string{"Flush": "Flush", "Fence": "Fence", "fence": "Fence", "Verify": "Verify"}[sel.Sel.Name]
					if op != "" {
						out = append(out, crash.Site{Op: op, File: filepath.Base(name), Line: fset.Position(call.Pos()).Line})
					}
				}
				return true
			})
		}
	}
	return out
}

// equivalent explains mutants that no crash can tell from the original, by function and operation. A mutant that survives and is not here fails.
var equivalent = map[string]string{}

// TestMutants leaves out each flush, fence and checksum in turn. Each mutant must be found out by the scenarios.
func TestMutants(t *testing.T) {
	all := scenarios()
	// Which scenarios pass a site: the others need not run.
	passes := map[crash.Site][]*scenario{}
	for _, sc := range all {
		m := &crash.Mutant{Seen: map[crash.Site]int{}}
		if _, _, err := sc.run(m, 1, 0, 13, false); err != nil {
			t.Fatal(err)
		}
		for s := range m.Seen {
			passes[s] = append(passes[s], sc)
		}
	}
	total, killed := 0, 0
	for _, s := range sites(t) {
		total++
		began := time.Now()
		why := kill(s, passes[s])
		took := time.Since(began).Round(time.Millisecond)
		if why == "" {
			if reason := equivalent[s.String()]; reason != "" {
				t.Logf("survives, explained: %s: %s", s, reason)
				continue
			}
			t.Errorf("survives: %s (passed by %d scenarios)", s, len(passes[s]))
			continue
		}
		killed++
		t.Logf("killed in %s: %s by %s", took, s, why)
	}
	t.Logf("mutants_total=%d mutants_killed=%d", total, killed)
	if total < 25 {
		t.Errorf("%d sites: the search for them is broken", total)
	}
}

// kill returns what found the mutant out, or "".
func kill(s crash.Site, scs []*scenario) string {
	if s.Op == "Verify" {
		if why := flips(s); why != "" {
			return why
		}
	}
	for _, nest := range []int{0, 7} { // cutting recovery short as well costs more, so later
		for _, sc := range scs {
			m := &crash.Mutant{Site: s}
			res, _, err := safely(func() (crash.Result, crash.Result, error) { return sc.run(m, 1500, 300, nest, true) })
			if err != nil {
				return fmt.Sprintf("%s: %v", sc.name, short(err))
			}
			if res.First != nil {
				return fmt.Sprintf("%s after %d states: %v", sc.name, res.States, short(res.First))
			}
		}
	}
	return ""
}

func short(err error) string {
	s := strings.ReplaceAll(err.Error(), "\n", " ")
	return s[:min(len(s), 90)]
}

func safely(fn func() (crash.Result, crash.Result, error)) (a, b crash.Result, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return fn()
}

// flips damages each byte of either header copy: what is read must be what was written.
func flips(s crash.Site) string {
	img, want := flipImage()
	for c := range 2 {
		for i := range 512 {
			bad := append([]byte(nil), img...)
			bad[c*4096+i] ^= 0x20
			m := &crash.Mutant{Site: s}
			r, err := scmlib.OpenImage(bad, scmlib.WithHook(scmlib.Options{}, &crash.Toucher{Touched: func(_, _ uint64) {}, Mutant: m}))
			if err != nil {
				return fmt.Sprintf("byte %d of header %d: %v", i, c, err)
			}
			got := r.Info()
			if !got.Healed || got.UUID != want.UUID || got.Layout != want.Layout || got.Generation != want.Generation+1 {
				return fmt.Sprintf("byte %d of header %d was believed", i, c)
			}
		}
	}
	return ""
}

func flipImage() ([]byte, scmlib.Info) {
	img := make([]byte, 64<<10)
	o := small
	o.Create, o.Layout = true, "flip"
	r, err := scmlib.OpenImage(img, o)
	if err != nil {
		panic(err)
	}
	info := r.Info()
	if err := r.Close(); err != nil {
		panic(err)
	}
	return img, info
}

// Without a mutant the same damage is healed.
func TestHeaderFlips(t *testing.T) {
	if why := flips(crash.Site{}); why != "" {
		t.Fatal(why)
	}
}
