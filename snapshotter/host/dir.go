// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Answer is yes, no, or that the machine does not tell.
type Answer int8

const (
	Unknown Answer = iota
	Yes
	No
)

func (a Answer) String() string { return [...]string{"unknown", "yes", "no"}[a] }

// MarshalText implements encoding.TextMarshaler.
func (a Answer) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

func answer(b bool) Answer {
	if b {
		return Yes
	}
	return No
}

// Dir is what is known of the filesystem that a directory stands on.
type Dir struct {
	Path       string   `json:"path"`
	Filesystem string   `json:"filesystem"` // as mount(8) names it
	Source     string   `json:"source"`     // device, where it has one
	MountPoint string   `json:"mount_point"`
	Options    []string `json:"options"` // of the mount and of the filesystem
	Dev        uint64   `json:"-"`
	Total      int64    `json:"total"` // bytes
	Free       int64    `json:"free"`  // bytes that a user who is not root could still write
	Inodes     int64    `json:"inodes"`
	InodesFree int64    `json:"inodes_free"`
	ReadOnly   bool     `json:"read_only"`
	DAX        Answer   `json:"dax"`        // new files are mapped without the page cache
	Rotational Answer   `json:"rotational"` // the device has to seek
	ReadAhead  int64    `json:"read_ahead"` // bytes that the kernel reads ahead; -1 unknown
}

// Facts looks at dir, which must exist. To learn about DAX it makes a file there for a moment, since the kernel decides
// it file by file; on a read-only filesystem that stays unknown.
func Facts(dir string) (Dir, error) {
	d := Dir{Path: dir}
	var sx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &sx); err != nil {
		return d, fmt.Errorf("look at directory %q: %w", dir, err)
	}
	if sx.Mode&unix.S_IFMT != unix.S_IFDIR {
		return d, fmt.Errorf("look at directory %q: %w", dir, unix.ENOTDIR)
	}
	d.Dev = unix.Mkdev(sx.Dev_major, sx.Dev_minor)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return d, fmt.Errorf("ask for the space of %q: %w", dir, err)
	}
	d.Total, d.Free = int64(fs.Blocks)*fs.Bsize, int64(fs.Bavail)*fs.Bsize
	d.Inodes, d.InodesFree = int64(fs.Files), int64(fs.Ffree)
	d.ReadOnly = fs.Flags&unix.ST_RDONLY != 0

	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return d, fmt.Errorf("read the mount table: %w", err)
	}
	d.findMount(string(info), sx.Mnt_id)
	d.DAX = daxOf(dir)
	d.Rotational = d.rotational()
	d.ReadAhead = readAhead(d.Dev)
	return d, nil
}

// findMount takes from a mount table what it has of the mount with that id. See proc(5), mountinfo.
func (d *Dir) findMount(table string, id uint64) {
	for line := range strings.Lines(table) {
		own, fs, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(own), strings.Fields(fs)
		if !ok || len(f) < 6 || len(g) < 3 || f[0] != strconv.FormatUint(id, 10) {
			continue
		}
		d.MountPoint, d.Filesystem, d.Source = unescape(f[4]), g[0], unescape(g[1])
		d.Options = append(strings.Split(f[5], ","), strings.Split(g[2], ",")...)
		return
	}
}

// unescape undoes the octal escapes of the mount table.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

func daxOf(dir string) Answer {
	f, err := os.CreateTemp(dir, ".dax-")
	if err != nil {
		return Unknown
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var sx unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &sx); err != nil {
		return Unknown
	}
	return answer(sx.Attributes&unix.STATX_ATTR_DAX != 0)
}

// rotational asks sysfs for the block device, or for the disk of a partition. What has no block device, such as tmpfs or
// overlayfs, has no answer; a loop device has that of the disk of its file.
// readAhead is what the kernel keeps for the filesystem with that number (Documentation/ABI/testing/sysfs-class-bdi).
func readAhead(dev uint64) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(dev), unix.Minor(dev)))
	kib, parseErr := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || parseErr != nil || kib < 0 {
		return -1
	}
	return kib << 10
}

func (d *Dir) rotational() Answer {
	if d.Filesystem == "tmpfs" || d.Filesystem == "ramfs" {
		return No
	}
	dev := d.Dev
	if unix.Major(dev) == 0 { // btrfs gives numbers of its own to its subvolumes
		var st unix.Stat_t
		if unix.Stat(d.Source, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return Unknown
		}
		dev = st.Rdev
	}
	return rotational(dev, 4)
}

func rotational(dev uint64, depth int) Answer {
	sys := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	if backing, err := os.ReadFile(filepath.Join(sys, "loop/backing_file")); err == nil && depth > 0 {
		file := strings.TrimSuffix(string(backing), "\n")
		var st unix.Stat_t
		if unix.Stat(file, &st) != nil {
			return Unknown
		}
		var fs unix.Statfs_t
		if unix.Statfs(file, &fs) == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC) {
			return No
		}
		if unix.Major(st.Dev) == 0 {
			return Unknown
		}
		return rotational(st.Dev, depth-1)
	}
	for _, queue := range []string{"queue/rotational", "../queue/rotational"} {
		if b, err := os.ReadFile(filepath.Join(sys, queue)); err == nil {
			return answer(strings.TrimSpace(string(b)) == "1")
		}
	}
	return Unknown
}

// SameFilesystem tells if files can be renamed from one of two directories to the other, or at least fill the same disk.
func (d Dir) SameFilesystem(o Dir) bool {
	return d.Dev == o.Dev || strings.HasPrefix(d.Source, "/dev/") && d.Source == o.Source
}

// Existing gives the nearest directory at or above path that exists.
func Existing(path string) (string, error) {
	for {
		info, err := os.Stat(path)
		switch {
		case err == nil && info.IsDir():
			return path, nil
		case err == nil:
			return "", fmt.Errorf("look at directory %q: %w", path, unix.ENOTDIR)
		case !errors.Is(err, os.ErrNotExist) || path == "/" || path == ".":
			return "", fmt.Errorf("look at directory: %w", err)
		}
		path = filepath.Dir(path)
	}
}
