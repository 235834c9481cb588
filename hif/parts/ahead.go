// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"os"

	"golang.org/x/sys/unix"
)

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
