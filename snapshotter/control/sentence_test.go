// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"testing"

	"github.com/stretchr/testify/require"
)

const someDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestLayerSentence(t *testing.T) {
	shares := &Decision{Tier: "nvm", Policy: "drain", Ldl: -1, NvmFree: 3e9, NvmReserve: 2e8, HddBacklog: 5e7, HddRate: 1.4e8, Files: []*Share{
		{Place: "pack", Rule: "in-time", Files: 300, Bytes: 12e6},
		{Place: "both", Rule: "hot", HotBy: "hot by profile", Files: 1, Bytes: 7e6},
		{Place: "nvm", Rule: "late", Files: 20, Bytes: 4e6},
		{Place: "tape", Rule: "archive", Files: 2, Bytes: 5},
	}}
	lass := &Decision{Tier: "hdd", Reason: "layer 1 to HDD: 1 other layer still downloads", Policy: "lass", Index: 1, Ldl: 0, Downloading: 1, BytesLeft: 9e6, NvmFree: 3e9}
	whole := &Decision{Tier: "hdd", Reason: "layer 1 to HDD: NVM has no room for it", Policy: "lass", Index: 1, Ldl: -1, Files: []*Share{{Place: "pack", Rule: "layer", Files: 9, Bytes: 20_000}}}
	guess := &Decision{Tier: "hdd", Reason: "layer 1 to HDD: late", Policy: "lass", Index: 1, Ldl: -1, Size: 4_510_000}
	for name, x := range map[string]struct {
		l    *Layer
		want string
	}{
		"placed by the file": {
			&Layer{Index: 1, Digest: someDigest, SnapshotId: "2", State: "durable", Tier: "nvm", Uncompressed: 23e6, NvmBytes: 11e6, HddBytes: 19e6, Decision: shares},
			"Layer 1 (2nd of 3, sha256:0123456789ab, 23.0 MB) stands on both tiers, 11.0 MB on NVM and 19.0 MB in its pack on HDD. Its files went, when it was stored " +
				"(policy drain, no other layer downloading, 3.00 GB free on NVM, 200 MB of it kept, 50.0 MB waiting for the HDD at 140 MB/s):\n" +
				"  12.0 MB in 300 files to the pack (the disk keeps up)\n  7.00 MB in 1 file to NVM and the pack (hot by profile)\n" +
				"  4.00 MB in 20 files to NVM alone (the disk would be late)\n  5 B in 2 files to tape (archive)",
		},
		"placed as a whole": {
			&Layer{Index: 1, SnapshotId: "2", State: "home", Tier: "hdd", Uncompressed: 20_000, HddBytes: 40_000, Decision: whole},
			"Layer 1 (2nd of 2, 20.0 kB) stands on HDD. Its files went, when it was stored (policy lass, no other layer downloading, 0 B free on NVM, 0 B of it kept):\n" +
				"  20.0 kB in 9 files to the pack (as the whole layer: NVM has no room for it)",
		},
		"a layer that a container's commit made has no digest": {
			&Layer{Index: 1, SnapshotId: "2", State: "home", Tier: "hdd", Uncompressed: 2, HddBytes: 8192},
			"Layer 1 (2nd of 2, 2 B) stands on HDD; nothing was decided about it, since it was not pulled.",
		},
		"copies are said to be copies": {
			&Layer{Index: 1, Digest: someDigest, SnapshotId: "2", State: "home", Tier: "both", Uncompressed: 1_990_000, NvmBytes: 1_990_000, HddBytes: 1_980_000, Decision: lass},
			"Layer 1 (2nd of 2, sha256:0123456789ab, 1.99 MB) stands whole in its pack on HDD (1.98 MB), with copies of 1.99 MB on NVM; when it was stored it went to HDD: " +
				"1 other layer still downloads. (Policy lass, 1 other layer with 9.00 MB to come, last download layer 0, 3.00 GB free on NVM, 0 B of it kept.)",
		},
		"a size that is a guess is said to be one": {
			&Layer{Index: 1, Digest: someDigest, SnapshotId: "2", State: "unpacking", Tier: "hdd", Decision: guess},
			"Layer 1 (2nd of 2, sha256:0123456789ab, about 4.51 MB) is being unpacked: late. (Policy lass, no other layer downloading, 0 B free on NVM, 0 B of it kept.)",
		},
		"nothing known": {&Layer{SnapshotId: "2", State: "staged", Tier: "nvm"},
			"Layer 0 (1st of 2, size not known yet) stands on NVM, in the directory that it was written to, and is packed in the background; nothing was decided about it, since it was not pulled."},
		"an empty layer": {&Layer{SnapshotId: "2", State: "home", Tier: "hdd"}, "Layer 0 (1st of 2, 0 B) stands on HDD; nothing was decided about it, since it was not pulled."},
		"not unpacked":   {&Layer{Digest: someDigest}, "Layer 0 (1st of 2, sha256:0123456789ab, size not known yet) is not unpacked for this snapshotter."},
		"damaged": {&Layer{SnapshotId: "2", State: "stored", Uncompressed: 5, Error: "checksum of\nblock 3 is wrong; pull the image again."},
			"Layer 0 (1st of 2, 5 B) cannot be used: checksum of block 3 is wrong; pull the image again."},
	} {
		total := 2
		if name == "placed by the file" {
			total = 3
		}
		require.Equal(t, x.want, x.l.Sentence(total), name)
	}
}

func TestFileSentence(t *testing.T) {
	l := &Layer{Index: 1, Digest: someDigest}
	for name, x := range map[string]struct {
		f    *File
		want string
	}{
		"with a reason": {
			&File{Path: []byte("/bin/sh"), Type: "file", Size: 6_800_000, LayerIndex: 1, Tier: "nvm", DataPath: []byte("/nvm/d/2/07/7"), Reason: "when its layer was stored (policy drain) it went to NVM and the pack (hot by profile); it is hot (95 % of the starts use it)"},
			"/bin/sh is a file of 6.80 MB from layer 1 (2nd of 3, sha256:0123456789ab); its data stands on NVM, at /nvm/d/2/07/7: when its layer was stored (policy drain) it went to NVM and the pack (hot by profile); it is hot (95 % of the starts use it).",
		},
		"lost": {
			&File{Path: []byte("/bin/sh"), Type: "file", Size: 5, LayerIndex: 1, Reason: "footer is cut off: data loss"},
			"/bin/sh is a file of 5 B from layer 1 (2nd of 3, sha256:0123456789ab); its data cannot be read: footer is cut off: data loss.",
		},
		"newline and escape": {
			&File{Path: []byte("/new\nline"), Type: "symlink", Target: []byte("\x1b[31m"), LayerIndex: 1},
			`"/new\nline" is a symlink to "\x1b[31m" from layer 1 (2nd of 3, sha256:0123456789ab); it has no data, only metadata in the image's view.`,
		},
		"not UTF-8": {
			&File{Path: []byte("/n/bad\xff"), Type: "file", Size: 300, LayerIndex: 1, Tier: "parts"},
			`"/n/bad\xff" is a file of 300 B from layer 1 (2nd of 3, sha256:0123456789ab); its data stands on HDD, and the parts of it that starts touch on NVM.`,
		},
		"empty": {&File{Path: []byte("/e"), Type: "file", LayerIndex: 1}, "/e is an empty file from layer 1 (2nd of 3, sha256:0123456789ab); it has no data, only metadata in the image's view."},
	} {
		require.Equal(t, x.want, x.f.Sentence(l, 3), name)
	}
	require.Contains(t, (&File{Path: []byte("/d"), Type: "directory"}).Sentence(nil, 1), "from layer 0 (1st of 1);")
}

func TestOrdinal(t *testing.T) {
	for n, want := range map[int]string{1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 102: "102nd", 111: "111th"} {
		require.Equal(t, want, ordinal(n))
	}
}
