// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
)

// memory is what the kernel tells of the memory modules below the store: how often they lost, at a shutdown, what they had promised to save. In a
// container nobody can ask, so regions are stamped with it before their container starts.
type memory struct {
	known bool
	lost  uint64
	id    [16]byte
}

// memoryBelow asks for the modules, if the filesystem of dir lies on persistent memory. Which of them it lies on is not asked: the counts of all are
// added up, and the id is that of all, so that no loss is missed (Documentation/ABI/testing/sysfs-bus-nfit, nmemX/nfit/dirty_shutdown).
func memoryBelow(sys, dir string) (m memory) {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return m
	}
	device, err := os.Readlink(filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))))
	if err != nil || !strings.HasPrefix(filepath.Base(device), "pmem") && !strings.Contains(device, "/ndbus") {
		return m
	}
	modules, _ := filepath.Glob(filepath.Join(sys, "bus/nd/devices/nmem*/nfit")) // in order
	ids := sha256.New()
	for _, d := range modules {
		b, err := os.ReadFile(filepath.Join(d, "dirty_shutdown"))
		if err != nil {
			continue // it does not count
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 64)
		if err != nil {
			continue
		}
		id, _ := os.ReadFile(filepath.Join(d, "id"))
		fmt.Fprintf(ids, "%s\x00%s\x00", filepath.Base(filepath.Dir(d)), id)
		m.known, m.lost = true, m.lost+n
	}
	if !m.known {
		log.L.WithField("root", dir).Info("the persistent memory below does not count unsafe shutdowns: programs are not told if it ever loses what it had promised to save")
	}
	m.lost++ // 0 means unknown in a header
	copy(m.id[:], ids.Sum(nil))
	return m
}

// stamp writes it into a region that scmlib made. One that is in use already has been stamped.
func (m memory) stamp(path string) error {
	if !m.known {
		return nil
	}
	ok, err := formatted(path)
	if err != nil || !ok {
		return err
	}
	err = scmlib.Stamp(path, m.lost, m.id)
	for _, unreadable := range []error{scmlib.ErrLocked, scmlib.ErrCorrupt, scmlib.ErrVersion, scmlib.ErrSize} {
		if errors.Is(err, unreadable) {
			return nil // its program will be told
		}
	}
	return err
}

// Guarantee is what this node can give the programs in containers, found by making a region and looking at it.
func (s *Store) Guarantee() (scmlib.Info, error) {
	dir, err := s.scratch()
	if err != nil {
		return scmlib.Info{}, err
	}
	r, err := scmlib.Open(filepath.Join(dir, "data"), scmlib.Options{Create: true, Size: 64 << 10})
	if err != nil {
		return scmlib.Info{}, errors.Join(fmt.Errorf("try a region on NVM: %w", err), os.RemoveAll(dir))
	}
	i := r.Info()
	return i, errors.Join(r.Close(), os.RemoveAll(dir))
}
