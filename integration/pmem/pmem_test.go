// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestFollow(t *testing.T) {
	killed := ""
	r := &bootResult{}
	r.follow(strings.NewReader("noise\r\nplan a b c d\r\nok a\r\nFAIL b: it broke: badly\r\nFAIL c\r\nkill working\r\n"), "t", func(when string) { killed = when })
	assert.Equal(t, "working", killed)
	assert.Equal(t, "kill", r.end)
	assert.Equal(t, []string{"a", "b", "c"}, r.seen)
	assert.Equal(t, 1, r.passed)
	assert.Equal(t, 2, r.failed, "a failure without a reason is one too")

	r.missing("t", "no more came")
	assert.Equal(t, 3, r.failed, "a check that was announced and not made is a failure")
}

func TestNoPlanFails(t *testing.T) {
	r := &bootResult{}
	r.follow(strings.NewReader("done\n"), "t", func(string) {})
	r.missing("t", "nothing came")
	assert.Equal(t, 1, r.failed, "a guest without checks must not pass")
}

func TestLastPromise(t *testing.T) {
	name := filepath.Join(t.TempDir(), "promises")
	for text, want := range map[string]uint64{"": 0, "1\n2\n": 2, "7\n8\n9": 8, "12": 0, "41\n42\n4": 42} {
		require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
		got, err := lastPromise(name)
		require.NoError(t, err, text)
		assert.Equal(t, want, got, "what is cut off was not said: %q", text)
	}
	require.NoError(t, os.WriteFile(name, []byte("1\nx\n"), 0o600))
	_, err := lastPromise(name)
	require.Error(t, err)
	got, err := lastPromise(name + "-none")
	require.NoError(t, err)
	assert.Zero(t, got)
}

func TestKernelName(t *testing.T) {
	for name, want := range map[string]bool{
		"linux-image-6.12.95+deb12-cloud-amd64":          true,
		"linux-image-6.12.9+deb13-cloud-amd64":           true,
		"linux-image-6.12-cloud-amd64":                   false,
		"linux-image-6.12.95+deb12-cloud-amd64-unsigned": false,
		"linux-image-6.12.95+deb12-amd64":                false,
		"linux-image-6.1.0-51-cloud-amd64":               false,
	} {
		assert.Equal(t, want, kernelName.MatchString(name), name)
	}
}

func TestMerged(t *testing.T) {
	tree := merged([][]entry{
		{dir("d"), file("d/gone", "1"), file("d/kept", "2"), dir("d/o"), file("d/o/old", "3"), dir("d/gonedir"), file("d/gonedir/f", "4"), file("d/gonedir-not", "5")},
		{dir("d"), file("d/.wh.gone", ""), file("d/.wh.gonedir", ""), dir("d/o"), file("d/o/.wh..wh..opq", ""), file("d/o/new", "6"),
			{name: "d/link", mode: unix.S_IFREG | 0o644, hard: "d/o/new"}},
	})
	var names []string
	for name := range tree {
		names = append(names, name)
	}
	slices.Sort(names)
	assert.Equal(t, []string{"d", "d/gonedir-not", "d/kept", "d/link", "d/o", "d/o/new"}, names)
	assert.EqualValues(t, 2, tree["d/link"].Links)
	assert.Equal(t, tree["d/link"], tree["d/o/new"])
}
