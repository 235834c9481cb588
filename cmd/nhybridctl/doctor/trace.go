// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Trace tries whether cold starts could be traced on NVM, with the rights of this process. Those of the daemon may
// be others: what it found itself is among its warnings.
func Trace(nvm host.Dir) []Finding {
	t, err := trace.New(trace.Config{Root: nvm.Path})
	if err == nil {
		err = t.Close()
	}
	return traced(err)
}

// traced is what an attempt to trace has shown.
func traced(err error) []Finding {
	f := &findings{area: "trace"}
	switch {
	case err == nil:
		f.ok("fanotify tells which files cold starts open")
	case errdefs.IsNotImplemented(err):
		text, cure := strings.Replace(control.ErrorMessage(err), " ("+errdefs.ErrNotImplemented.Error()+")", "", 1), "see the daemon's log"
		if i := strings.LastIndex(text, "; "); i >= 0 {
			text, cure = text[:i], text[i+2:]
		}
		f.add(Warn, cure, "%s: hot files are only guessed from the image", text)
	default:
		f.add(Warn, "see dmesg for errors of the device", "fanotify was not tried: %s", control.ErrorMessage(err))
	}
	return f.all
}
