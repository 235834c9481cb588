// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// bdis is where the kernel shows how far it reads ahead on each filesystem (Documentation/ABI/testing/sysfs-class-bdi). That
// of a filesystem without a device has its type and a running number as name, and nothing tells of which mount it is.
const bdis = "/sys/class/bdi"

// ReadAhead is how far the kernel reads ahead on a mount. The zero value is of none.
type ReadAhead struct{ file string }

// Set takes effect for files that are opened from now on. The error is errdefs.ErrNotFound for the zero value.
func (r ReadAhead) Set(bytes int64) error {
	if r.file == "" {
		return fmt.Errorf("set read-ahead: the entry of the mount in %s is not known: %w", bdis, errdefs.ErrNotFound)
	}
	if err := os.WriteFile(r.file, []byte(strconv.FormatInt(bytes>>10, 10)), 0); err != nil {
		return fmt.Errorf("set read-ahead: %w", err)
	}
	return nil
}

// mounting keeps the mounts of this process apart, for mountReadingAhead.
var mounting sync.Mutex

// mountReadingAhead makes a mount on which the kernel reads so many bytes ahead. It knows the mount's entry in bdis as the only
// one that was not there before, and mounts again if others mount EROFS at the same time. An error to set the read-ahead is
// logged only: it costs time, or makes a trace less precise.
func mountReadingAhead(bytes int64, mount func() (int, error)) (int, ReadAhead, error) {
	mounting.Lock()
	defer mounting.Unlock()
	for tries := 1; ; tries++ {
		before := withoutDevice()
		mnt, err := mount()
		if err != nil {
			return -1, ReadAhead{}, err
		}
		after := withoutDevice()
		maps.DeleteFunc(after, func(name string, _ bool) bool { return before[name] })
		if len(after) > 1 && tries < 5 {
			unix.Close(mnt)
			continue
		}
		r := readAheadOf(mnt, after)
		if err := r.Set(bytes); err != nil {
			log.L.WithError(err).Warn("the kernel reads ahead on an EROFS mount as it likes")
		}
		return mnt, r, nil
	}
}

// readAheadOf finds the entry of a mount; fresh are those that came with it.
func readAheadOf(mnt int, fresh map[string]bool) ReadAhead {
	var st unix.Stat_t
	if err := unix.Fstat(mnt, &st); err != nil {
		return ReadAhead{}
	}
	name := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if unix.Major(st.Dev) == 0 { // no block device
		if len(fresh) != 1 {
			return ReadAhead{}
		}
		for name = range fresh {
		}
	}
	return ReadAhead{filepath.Join(bdis, name, "read_ahead_kb")}
}

// withoutDevice are the entries of EROFS mounts without a device.
func withoutDevice() map[string]bool {
	names, _ := filepath.Glob(filepath.Join(bdis, "erofs-*")) // fails for a bad pattern only
	all := make(map[string]bool, len(names))
	for _, n := range names {
		all[filepath.Base(n)] = true
	}
	return all
}
