// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// bdis is where the kernel shows how far it reads ahead on each filesystem (Documentation/ABI/testing/sysfs-class-bdi). One that
// is on no device is there as its type and a running number (super_setup_bdi), and nothing tells of which mount it is.
const bdis = "/sys/class/bdi/erofs-*"

// mounting keeps mounts of this process apart, for readingAhead.
var mounting sync.Mutex

// readingAhead makes a mount on which the kernel reads so many bytes ahead. It knows the new one by its being the only one that
// was not there before; if others mount EROFS in the same moment it tries again. What cannot be set is logged: what is around
// hot chunks is then read from the HDD, which costs time, and nothing else.
func readingAhead(bytes int64, mount func() (int, error)) (int, error) {
	mounting.Lock()
	defer mounting.Unlock()
	for tries := 1; ; tries++ {
		before := glob(bdis)
		mnt, err := mount()
		if err != nil {
			return -1, err
		}
		after := glob(bdis)
		maps.DeleteFunc(after, func(name string, _ bool) bool { return before[name] })
		if len(after) > 1 && tries < 5 {
			unix.Close(mnt)
			continue
		}
		err = fmt.Errorf("%d filesystems are new in %s", len(after), bdis)
		if len(after) == 1 {
			for name := range after {
				err = os.WriteFile(filepath.Join(name, "read_ahead_kb"), []byte(strconv.FormatInt(bytes>>10, 10)), 0)
			}
		}
		if err != nil {
			log.L.WithError(err).Warn("of parts of large files the kernel reads further ahead than it should")
		}
		return mnt, nil
	}
}

func glob(pattern string) map[string]bool {
	names, _ := filepath.Glob(pattern) // fails for a bad pattern only
	all := make(map[string]bool, len(names))
	for _, n := range names {
		all[n] = true
	}
	return all
}

// aheadStep is what one call of posix_fadvise asks for. Beyond the read-ahead of the device or the size of its largest request,
// whichever is more, the kernel silently cuts a request off (mm/readahead.c, force_page_cache_ra); 128 KiB is the default of the former.
const aheadStep = 128 << 10

// ReadAhead has the kernel bring the image at path into the page cache, up to so many bytes, so that a start that reads its
// files finds them there. It returns how many bytes were asked for, 0 if there is no image.
func ReadAhead(path string, limit int64) (bytes int64) {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0
	}
	return WillNeed(int(f.Fd()), 0, min(limit, st.Size()))
}

// WillNeed has the kernel read a part of an open file into the page cache. It returns how many bytes were asked for.
func WillNeed(fd int, off, length int64) (bytes int64) {
	for bytes < length && unix.Fadvise(fd, off+bytes, min(aheadStep, length-bytes), unix.FADV_WILLNEED) == nil {
		bytes += aheadStep
	}
	return min(bytes, length)
}

// Forget takes the image at path out of the page cache: what was read of its files is cached with them.
func Forget(path string) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // a hint
}
