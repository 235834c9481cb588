// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPersistentMemory(t *testing.T) {
	name := filepath.Join(t.TempDir(), "iomem")
	text := "00000000-00000fff : Reserved\n00100000-5fffffff : System RAM\n100000000-13fffffff : Persistent Memory\n  100400000-13fffffff : namespace0.0\n"
	require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	spans, err := persistentMemory(name)
	require.NoError(t, err)
	assert.Equal(t, []span{{0x100000000, 0x13fffffff}}, spans)

	require.NoError(t, os.WriteFile(name, []byte("00100000-5fffffff : System RAM\n"), 0o600))
	_, err = persistentMemory(name)
	assert.ErrorIs(t, err, errNone, "without any, every page would pass for one outside")
}

func TestCheckProbe(t *testing.T) {
	g := &guest{pmem: []span{{0x1000, 0x1fff}}}
	assert.NoError(t, g.checkProbe("text=1000 file=2000\n", "text", true))
	assert.NoError(t, g.checkProbe("text=1000 file=2000\n", "file", false))
	assert.NoError(t, g.checkProbe("text=1fff file=fff", "text", true))
	assert.Error(t, g.checkProbe("text=1000 file=2000", "file", true))
	assert.Error(t, g.checkProbe("text=1000 file=2000", "text", false))
	assert.Error(t, g.checkProbe("", "text", false))
}

func TestCompareLedger(t *testing.T) {
	g := &guest{boot: "second", domain: "mem-ctrl", said: map[string]uint64{"go": 12}}
	out := "granularity cache line\ndurability power loss\nmapsync 1\nwhy so\nrecovered 1\ncount 12\nworking\n"
	assert.NoError(t, g.compareLedger("go", readFacts(out)))
	g.said["go"] = 13
	assert.ErrorContains(t, g.compareLedger("go", readFacts(out)), "12 transactions are there, and 13 had been promised")
	g.said["go"] = 0
	assert.Error(t, g.compareLedger("go", readFacts("granularity cache line\ndurability power loss\nmapsync 1\n")), "it has not said its count")
	g.domain = "cpu"
	assert.ErrorContains(t, g.compareLedger("go", readFacts(out)), `granularity is "cache line", want "byte"`)
}

func TestReadSaid(t *testing.T) {
	said, err := readSaid("go:12,c:0")
	require.NoError(t, err)
	assert.Equal(t, map[string]uint64{"go": 12, "c": 0}, said)
	_, err = readSaid("go:")
	assert.Error(t, err)
}
