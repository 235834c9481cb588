// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

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

// Printable writes a path of an image, which may hold any bytes: one that is not UTF-8, or that would steer the terminal
// (newlines, escape sequences), is quoted as in Go.
func Printable(path string) string {
	if !utf8.ValidString(path) || strings.ContainsFunc(path, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(path)
	}
	return path
}

// Cause is the reason of a decision without the words that a table shows anyway, "layer 3 to NVM: ".
func (d *Decision) Cause() string {
	return strings.TrimPrefix(d.GetReason(), fmt.Sprintf("layer %d to %s: ", d.GetIndex(), strings.ToUpper(d.GetTier())))
}

// Clause says what the share is and why: "12.0 MB in 300 files to the pack (the disk keeps up)".
func (s *Share) Clause() string {
	placed, ok := s.Placed()
	if !ok {
		return fmt.Sprintf("%s in %d files to %s (%s)", placement.FormatBytes(s.GetBytes()), s.GetFiles(), s.GetPlace(), s.GetRule())
	}
	return placed.Clause()
}

// Placed is the share as package placement has it; false if a newer daemon recorded a place that this one does not know.
func (s *Share) Placed() (placement.Share, bool) {
	var place placement.Place
	if place.UnmarshalText([]byte(s.GetPlace())) != nil {
		return placement.Share{}, false
	}
	return placement.Share{Place: place, Rule: placement.Rule(s.GetRule()), HotBy: s.GetHotBy(), Files: s.GetFiles(), Bytes: s.GetBytes()}, true
}

// Stored reports whether the layer was stored whole, so that its sizes are known.
func (l *Layer) Stored() bool {
	switch l.GetState() {
	case "stored", "durable", "home":
		return true
	}
	return false
}

// name says which layer of an image with total layers it is. The index counts from 0, as in commands and policies, so the
// place in the image is said beside it.
func (l *Layer) name(total int) string {
	about := []string{fmt.Sprintf("%s of %d", ordinal(int(l.GetIndex())+1), total)}
	if l.GetDigest() != "" {
		about = append(about, Short(l.GetDigest()))
	}
	switch d := l.GetDecision(); {
	case l.Stored() || l.GetUncompressed() > 0:
		about = append(about, placement.FormatBytes(l.GetUncompressed()))
	case d.GetSize() > 0 && d.GetSizeExact():
		about = append(about, placement.FormatBytes(d.GetSize())+" by its blob")
	case d.GetSize() > 0:
		about = append(about, "about "+placement.FormatBytes(d.GetSize()))
	default:
		about = append(about, "size not known yet")
	}
	return fmt.Sprintf("Layer %d (%s)", l.GetIndex(), strings.Join(about, ", "))
}

// place says where the bytes of the layer are, as the end of a sentence that begins with its name.
func (l *Layer) place() string {
	nvm, hdd := placement.FormatBytes(l.GetNvmBytes()), placement.FormatBytes(l.GetHddBytes())
	both := l.GetNvmBytes() > 0 && l.GetHddBytes() > 0
	switch {
	case l.GetState() == "unpacking":
		return " is being unpacked"
	case l.GetState() == "staged":
		return fmt.Sprintf(" stands on %s, in the directory that it was written to, and is packed in the background", strings.ToUpper(l.GetTier()))
	case both && l.GetState() == "home":
		return fmt.Sprintf(" stands whole in its pack on HDD (%s), with copies of %s on NVM", hdd, nvm)
	case both:
		return fmt.Sprintf(" stands on both tiers, %s on NVM and %s in its pack on HDD", nvm, hdd)
	}
	return " stands on " + strings.ToUpper(l.GetTier())
}

// Sentence tells where a layer of an image with total layers stands, and why. Where its files were placed one by one, a line
// for each share of them follows.
func (l *Layer) Sentence(total int) string {
	name := l.name(total)
	if l.GetSnapshotId() == "" {
		return name + " is not unpacked for this snapshotter."
	}
	if l.GetError() != "" {
		return name + " cannot be used: " + strings.TrimSuffix(Message(l.GetError()), ".") + "."
	}
	place, d := l.place(), l.GetDecision()
	switch {
	case d == nil:
		return name + place + "; nothing was decided about it, since it was not pulled."
	case len(d.GetFiles()) > 0:
		lines := []string{fmt.Sprintf("%s%s. Its files went, when it was stored (policy %s, %s):", name, place, d.GetPolicy(), d.inputs())}
		for _, s := range d.GetFiles() {
			clause := s.Clause()
			if s.GetRule() == string(placement.RuleLayer) && d.GetReason() != "" {
				clause = strings.TrimSuffix(clause, ")") + ": " + d.Cause() + ")"
			}
			lines = append(lines, "  "+clause)
		}
		return strings.Join(lines, "\n")
	}
	why := ": " + d.Cause()
	if d.GetTier() != l.GetTier() {
		why = fmt.Sprintf("; when it was stored it went to %s: %s", strings.ToUpper(d.GetTier()), d.Cause())
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

// Sentence tells what a file of an image is, which layer it comes from, and where its data stands and why.
func (f *File) Sentence(l *Layer, total int) string {
	path := Printable(string(f.GetPath()))
	from := fmt.Sprintf("from layer %d (%s of %d", f.GetLayerIndex(), ordinal(int(f.GetLayerIndex())+1), total)
	if l.GetDigest() != "" {
		from += ", " + Short(l.GetDigest())
	}
	from += ")"
	switch {
	case f.GetType() == "symlink":
		return fmt.Sprintf("%s is a symlink to %s %s; it has no data, only metadata in the image's view.", path, Printable(string(f.GetTarget())), from)
	case f.GetTier() == "" && f.GetType() == "file" && f.GetSize() > 0:
		return fmt.Sprintf("%s is a file of %s %s; its data cannot be read%s.", path, placement.FormatBytes(f.GetSize()), from, f.because())
	case f.GetTier() == "":
		return fmt.Sprintf("%s is %s %s; it has no data, only metadata in the image's view.", path, article(f.GetType(), f.GetSize()), from)
	}
	on := strings.ToUpper(f.GetTier())
	if f.GetTier() == "parts" {
		on = "HDD, and the parts of it that starts touch on NVM"
	}
	at := ""
	if len(f.GetDataPath()) > 0 {
		at = ", at " + Printable(string(f.GetDataPath()))
	}
	return fmt.Sprintf("%s is a file of %s %s; its data stands on %s%s%s.", path, placement.FormatBytes(f.GetSize()), from, on, at, f.because())
}

// because is the reason, as the end of a sentence.
func (f *File) because() string {
	if f.GetReason() == "" {
		return ""
	}
	return ": " + strings.TrimSuffix(Message(f.GetReason()), ".")
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

// ordinal writes n as 1st, 2nd, 3rd, 4th.
func ordinal(n int) string {
	suffix := "th"
	if n/10%10 != 1 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return strconv.Itoa(n) + suffix
}
