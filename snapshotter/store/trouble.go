// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Trouble says why a layer cannot be used, what is done about it and, behind the last
// semicolon, the cure; "" if it can be used. images are names of images that have it in
// a namespace of containerd, as far as they are known.
func (s *Store) Trouble(id LayerID, namespace string, images ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.layers[id]
	if l == nil {
		return ""
	}
	return l.trouble(namespace, images)
}

// trouble does so. Called with Store.mu held.
func (l *layer) trouble(namespace string, images []string) string {
	rec := l.rec
	image := l.refetch.image
	if namespace == "" || len(images) == 0 {
		namespace = rec.Namespace
	} else {
		image = images[0]
	}
	fetch := fmt.Sprintf("ctr -n %s content fetch %s", namespace, image)
	if image == "" {
		fetch = fmt.Sprintf("ctr -n %s content fetch, of an image that has blob %s", namespace, rec.Blob)
	}
	switch {
	case rec.Damaged == "":
		return ""
	case rec.Blob == "":
		return said("%s; it came by no pull, so that it cannot be fetched again; remove the containers and images that use it", rec.Damaged)
	case l.unpack != nil && l.unpack.fetches && l.refetch.image != "":
		return said("%s; its blob is fetched again from the registry of %s; wait for that", rec.Damaged, l.refetch.image)
	case l.unpack != nil:
		return said("%s; it is being unpacked anew; wait for that", rec.Damaged)
	case l.refetch.err != nil:
		return said("%s; containerd has lost its blob, and it could not be fetched again, which is tried now and then: %v; fetch it by hand: %s",
			rec.Damaged, l.refetch.err, fetch)
	case l.last != nil:
		return said("%s; it could not be unpacked anew, which is tried now and then: %v; mend that, or if the blob is gone fetch it: %s", rec.Damaged, l.last, fetch)
	case rec.Repairs >= mostRepairs:
		return said("%s; it was unpacked anew %d times and is so again when a container needs it; look for errors of the disks with dmesg", rec.Damaged, rec.Repairs)
	}
	return said("%s; it is going to be unpacked anew; wait for that, or if that fails fetch its blob: %s", rec.Damaged, fetch)
}

// said is a sentence without semicolons in its values.
func said(format string, values ...any) string {
	for i, v := range values {
		switch v := v.(type) {
		case error: // its class is for programs
			text := strings.TrimSuffix(v.Error(), ": "+errdefs.ErrUnavailable.Error())
			values[i] = strings.ReplaceAll(text, ";", ",")
		case string:
			values[i] = strings.ReplaceAll(v, ";", ",")
		}
	}
	return fmt.Sprintf(format, values...)
}
