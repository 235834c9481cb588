// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
)

func TestEnv(t *testing.T) {
	dir := scratch(t)
	path := filepath.Join(dir, "r")
	env := func(kv ...string) func(string) string {
		return func(k string) string {
			for i := 0; i < len(kv); i += 2 {
				if kv[i] == k {
					return kv[i+1]
				}
			}
			return ""
		}
	}
	r, err := scmlib.FromEnvWith(env("SCM_REGION", path, "SCM_SIZE", "1m"), scmlib.Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if i := r.Info(); i.Size != mib || i.Mode != scmlib.Auto || i.Path != path {
		t.Errorf("%+v", i)
	}
	r.Close()
	r, err = scmlib.FromEnvWith(env("SCM_REGION", path, "SCM_MODE", "volume"), scmlib.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if i := r.Info(); i.Mode != scmlib.Volume || i.Granularity != scmlib.Page || i.Instruction != "msync" {
		t.Errorf("volume: %+v", i)
	}
	if _, err := scmlib.Root[[2]uint64](r); err != nil {
		t.Error(err)
	}
	r.Close()
	r, err = scmlib.FromEnvWith(env("SCM_MODE", "dram"), scmlib.Options{Size: mib})
	if err != nil {
		t.Fatal(err)
	}
	if i := r.Info(); i.Mode != scmlib.DRAM || i.Durability != scmlib.Volatile {
		t.Errorf("dram: %+v", i)
	}
	r.Close()
	for name, c := range map[string]struct {
		env  func(string) string
		o    scmlib.Options
		want error
	}{
		"no region":  {env("SCM_MODE", "storage"), scmlib.Options{}, scmlib.ErrNoRegion},
		"mode":       {env("SCM_MODE", "disk"), scmlib.Options{}, scmlib.ErrNoRegion},
		"disagree":   {env("SCM_MODE", "dram"), scmlib.Options{Mode: scmlib.Mapping}, scmlib.ErrNoRegion},
		"size":       {env("SCM_SIZE", "lots", "SCM_REGION", path), scmlib.Options{}, scmlib.ErrSize},
		"size 2":     {env("SCM_SIZE", "-1g", "SCM_REGION", path), scmlib.Options{}, scmlib.ErrSize},
		"dram power": {env("SCM_MODE", "dram"), scmlib.Options{Size: mib, Require: scmlib.Guarantee{Durability: scmlib.PowerLoss}}, scmlib.ErrDurability},
		"dram size":  {env("SCM_MODE", "dram"), scmlib.Options{}, nil},
	} {
		r, err := scmlib.FromEnvWith(c.env, c.o)
		if err == nil {
			r.Close()
		}
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestForced(t *testing.T) {
	path := filepath.Join(scratch(t), "r")
	t.Setenv("SCM_FORCE_GRANULARITY", "page")
	t.Setenv("SCM_FORCE_DURABILITY", "power")
	r := create(t, path, scmlib.Options{Require: scmlib.Guarantee{Durability: scmlib.PowerLoss}})
	if i := r.Info(); !i.Forced || i.Granularity != scmlib.Page || i.Durability != scmlib.PowerLoss {
		t.Errorf("%+v", i)
	}
	r.Close()
	t.Setenv("SCM_FORCE_GRANULARITY", "fine")
	if _, err := scmlib.Open(path, scmlib.Options{}); err == nil || !strings.Contains(err.Error(), "byte, cacheline or page") {
		t.Error(err)
	}
}

// Overlayfs refuses MAP_SYNC: mode mapping must fail there and name it.
func TestOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := scratch(t)
	at := func(n string) string {
		p := filepath.Join(dir, n)
		if err := os.Mkdir(p, 0o700); err != nil {
			t.Fatal(err)
		}
		return p
	}
	lower, upper, work, mnt := at("lower"), at("upper"), at("work"), at("mnt")
	if err := unix.Mount("overlay", mnt, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		t.Skipf("mount overlay: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	p := filepath.Join(mnt, "r")
	_, err := scmlib.Open(p, scmlib.Options{Create: true, Size: mib, Mode: scmlib.Mapping})
	if !errors.Is(err, scmlib.ErrGranularity) || !strings.Contains(err.Error(), "overlay") || !strings.Contains(err.Error(), mnt) {
		t.Fatalf("%v", err)
	}
	if _, err := os.Stat(p); err == nil {
		t.Error("a file was left behind")
	}
	r := create(t, p, scmlib.Options{Mode: scmlib.Storage})
	if i := r.Info(); i.Granularity != scmlib.Page || i.Filesystem != "overlay" || onMemory(t, dir) && i.Durability != scmlib.ProcessCrash {
		t.Errorf("%+v", i)
	}
	if err := r.Update(func(tx *scmlib.Tx) error { _, err := tx.Alloc(100); return err }); err != nil {
		t.Error(err)
	}
}

func TestEADR(t *testing.T) {
	dir := t.TempDir()
	if scmlib.EADR(dir) {
		t.Error("no region is no eADR")
	}
	for i, d := range []string{"cpu_cache\n", "cpu_cache\n", "memory_controller\n"} {
		p := filepath.Join(dir, fmt.Sprint("region", i))
		if err := errors.Join(os.Mkdir(p, 0o700), os.WriteFile(filepath.Join(p, "persistence_domain"), []byte(d), 0o600)); err != nil {
			t.Fatal(err)
		}
		if got := scmlib.EADR(dir); got != (i < 2) {
			t.Errorf("with %d regions: %v", i+1, got)
		}
	}
}

func TestTypes(t *testing.T) {
	type inner struct{ P scmlib.Ptr[[]string] }
	type good struct {
		A int64
		B [3]inner
		C scmlib.Off
		D float32
	}
	if err := scmlib.CheckType[good](); err != nil {
		t.Error(err)
	}
	for want, err := range map[string]error{
		"string":    scmlib.CheckType[struct{ A, B [2]string }](),
		"slice":     scmlib.CheckType[[]byte](),
		"ptr":       scmlib.CheckType[struct{ X struct{ Y *int } }](),
		"map":       scmlib.CheckType[[4]map[int]int](),
		"func":      scmlib.CheckType[func()](),
		"chan":      scmlib.CheckType[chan int](),
		"interface": scmlib.CheckType[any](),
		"uintptr":   scmlib.CheckType[uintptr](),
	} {
		if !errors.Is(err, scmlib.ErrType) || !strings.Contains(fmt.Sprint(err), "is a "+want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
