// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"strings"

	"github.com/nhybrid/nhybrid/placement"
)

// Short cuts a digest to what a person compares: "sha256:0123456789ab".
func Short(digest string) string {
	algorithm, hex, ok := strings.Cut(digest, ":")
	if !ok || len(hex) <= 12 {
		return digest
	}
	return algorithm + ":" + hex[:12]
}

// Cause is the reason of a decision without the words that a table shows anyway, "layer 3 to NVM: ".
func (d *Decision) Cause() string {
	return strings.TrimPrefix(d.GetReason(), fmt.Sprintf("layer %d to %s: ", d.GetIndex(), strings.ToUpper(d.GetTier())))
}

// Sentence tells where a layer of an image with total layers stands, and why.
func (l *Layer) Sentence(total int) string {
	name := fmt.Sprintf("Layer %d of %d (%s, %s)", l.GetIndex(), total, Short(l.GetDigest()), placement.FormatBytes(l.GetUncompressed()))
	if l.GetSnapshotId() == "" {
		return name + " is not unpacked for this snapshotter."
	}
	place := " stands on " + strings.ToUpper(l.GetTier())
	if nvm, hdd := l.GetNvmBytes(), l.GetHddBytes(); nvm > 0 && hdd > 0 {
		place += fmt.Sprintf(", with %s on NVM and %s on HDD", placement.FormatBytes(nvm), placement.FormatBytes(hdd))
	}
	d := l.GetDecision()
	if d == nil {
		return name + place + "; nothing was decided about it, since it was not pulled."
	}
	why := ": " + d.Cause()
	if d.GetTier() != l.GetTier() {
		why = fmt.Sprintf(" now; when it was stored it went to %s: %s", strings.ToUpper(d.GetTier()), d.Cause())
	}
	return fmt.Sprintf("%s%s%s. (Policy %s, %s.)", name, place, strings.TrimSuffix(why, "."), d.GetPolicy(), d.inputs())
}

// inputs says what the decision rested on.
func (d *Decision) inputs() string {
	var parts []string
	switch n, left := d.GetDownloading(), placement.FormatBytes(d.GetBytesLeft()); n {
	case 0:
		parts = append(parts, "no other layer downloading")
	case 1:
		parts = append(parts, "1 other layer with "+left+" to come")
	default:
		parts = append(parts, fmt.Sprintf("%d other layers with %s to come", n, left))
	}
	if ldl := d.GetLdl(); ldl >= 0 {
		parts = append(parts, fmt.Sprintf("last download layer %d", ldl))
	}
	parts = append(parts, fmt.Sprintf("%s free on NVM, %s of it kept", placement.FormatBytes(d.GetNvmFree()), placement.FormatBytes(d.GetNvmReserve())))
	if d.GetHddRate() > 0 {
		parts = append(parts, fmt.Sprintf("%s waiting for the HDD at %s", placement.FormatBytes(d.GetHddBacklog()), placement.FormatRate(d.GetHddRate())))
	}
	return strings.Join(parts, ", ")
}

// Sentence tells what a file of an image is, which layer it comes from and where its data stands.
func (f *File) Sentence(l *Layer, total int) string {
	from := fmt.Sprintf("from layer %d of %d (%s)", f.GetLayerIndex(), total, Short(l.GetDigest()))
	switch {
	case f.GetType() == "symlink":
		return fmt.Sprintf("%s is a symlink to %s %s; it has no data, only metadata in the tree on NVM.", f.GetPath(), f.GetTarget(), from)
	case f.GetTier() == "":
		return fmt.Sprintf("%s is %s %s; it has no data, only metadata in the tree on NVM.", f.GetPath(), article(f.GetType(), f.GetSize()), from)
	}
	return fmt.Sprintf("%s is a file of %s %s; its data stands on %s, at %s.",
		f.GetPath(), placement.FormatBytes(f.GetSize()), from, strings.ToUpper(f.GetTier()), f.GetDataPath())
}

func article(kind string, size int64) string {
	switch {
	case kind == "file" && size == 0:
		return "an empty file"
	case kind == "":
		return "something"
	}
	return "a " + kind
}
