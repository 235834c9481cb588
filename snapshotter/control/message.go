// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

const (
	// longWord is the length of a word from which it is cut, in bytes: a path of an image may have 4096.
	longWord = 256
	wordEnds = 80 // bytes that stay of each end
)

// classes are the classes of errors that nest when an error is passed on by several hands.
var classes = []error{
	errdefs.ErrDataLoss, errdefs.ErrNotFound, errdefs.ErrUnavailable, errdefs.ErrAlreadyExists, errdefs.ErrInternal,
	errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented,
}

// OneFilesystem begins what the daemon warns of where both tiers stand on one filesystem.
const OneFilesystem = "root and nvm_root stand on one filesystem"

// Cure takes from a warning the cure, which follows the last semicolon.
func Cure(warning string) (text, cure string) {
	if i := strings.LastIndex(warning, "; "); i >= 0 {
		return warning[:i], warning[i+2:]
	}
	return warning, ""
}

// Message makes of the text of an error, or of anything that was said by a program, one line for a person: words that are too
// long to be read are cut in their middle, and a class that stands there several times is said once, the last time.
func Message(text string) string {
	words := strings.Fields(text)
	for i, w := range words {
		words[i] = shorten(w)
	}
	s := strings.Join(words, " ")
	for _, class := range classes {
		if said := ": " + class.Error(); strings.Count(s, said) > 1 {
			s = strings.Replace(s, said, "", strings.Count(s, said)-1)
		}
	}
	return s
}

// ErrorMessage is [Message] of an error, without a class at its end that is of use to programs only.
func ErrorMessage(err error) string {
	s := Message(err.Error())
	for _, class := range []error{errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented} {
		s = strings.TrimSuffix(s, ": "+class.Error())
	}
	return s
}

func shorten(word string) string {
	if len(word) < longWord {
		return word
	}
	head, tail := word[:wordEnds], word[len(word)-wordEnds:]
	for len(head) > 0 && !utf8.ValidString(head) && utf8.ValidString(word) { // no character is cut in two
		head = head[:len(head)-1]
	}
	for len(tail) > 0 && !utf8.ValidString(tail) && utf8.ValidString(word) {
		tail = tail[1:]
	}
	return head + "…" + tail
}
