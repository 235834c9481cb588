// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib/region"
)

// kind is what CDI takes: a vendor, which looks like the name of a host, and a class.
var kind = regexp.MustCompile(`^[a-zA-Z]([a-zA-Z0-9._-]*[a-zA-Z0-9])?/[a-zA-Z]([a-zA-Z0-9_-]*[a-zA-Z0-9])?$`)

// maxPool keeps a slip of the finger from filling NVM with directories.
const maxPool = 10_000

func (c Config) checkSCM() error {
	s := c.SCM
	if err := errors.Join(checkSocket("scm.address", s.Address), checkSocket("scm.nri_socket", s.NRISocket)); err != nil {
		return err
	}
	for _, other := range []struct{ key, path string }{
		{"address", c.Address}, {"control_address", c.ControlAddress}, {"containerd.address", c.Containerd.Address}, {"metrics_address", c.MetricsAddress},
	} {
		if s.Address == other.path {
			return invalid("scm.address: is the socket of %s; give it one of its own", other.key)
		}
	}
	// A share and a number of bytes can be compared only where NVM is; the daemon does that.
	alike := (s.Reserve.Percent != 0) == (s.Limit.Percent != 0)
	if alike && s.Limit != (Space{}) && (s.Reserve.Percent > s.Limit.Percent || s.Reserve.Bytes > s.Limit.Bytes) {
		return invalid("scm.reserve: %s is more than scm.limit, which is %s: no more can be kept for regions than they may have", s.Reserve, s.Limit)
	}
	if s.Regions < 0 {
		return invalid("scm.regions: %d is negative; give a number of regions, or 0", s.Regions)
	}
	if _, err := s.QuotaOf(1 << 40); err != nil {
		return err
	}
	if _, err := s.PoolOf(); err != nil {
		return err
	}
	if s.CDISpec != "" && (!filepath.IsAbs(s.CDISpec) || filepath.Ext(s.CDISpec) != ".json") {
		return invalid("scm.cdi_spec: %q is not the absolute path of a file whose name ends in .json, such as %q", s.CDISpec, Default().SCM.CDISpec)
	}
	if !kind.MatchString(s.CDIKind) {
		return invalid("scm.cdi_kind: %q is not a vendor and a class, such as %q", s.CDIKind, Default().SCM.CDIKind)
	}
	if s.Hook != "" && !filepath.IsAbs(s.Hook) {
		return invalid("scm.hook: %q is relative; give the absolute path of nhybrid-scm-hook", s.Hook)
	}
	return nil
}

// QuotaOf gives the quotas of the namespaces that have one of their own, on a filesystem of total bytes.
func (s SCM) QuotaOf(total int64) (map[string]region.Quota, error) {
	quotas := map[string]region.Quota{}
	for _, item := range s.Quotas {
		var of Space
		if err := of.UnmarshalText([]byte(item.Value)); err != nil {
			return nil, invalid("scm.quotas: %s: %s", item.Name, err)
		}
		if _, err := region.ParseRef(item.Name, "volume"); err != nil {
			return nil, invalid("scm.quotas: %q is not the name of a namespace of containerd", item.Name)
		}
		quotas[item.Name] = region.Quota{Bytes: of.Of(total), Regions: s.Regions}
	}
	return quotas, nil
}

// PoolOf gives how many regions of each size wait.
func (s SCM) PoolOf() (map[int64]int, error) {
	pool := map[int64]int{}
	for _, item := range s.Pool {
		size, err := region.ParseSize(item.Name)
		if err != nil {
			return nil, invalid("scm.pool: %s", strings.TrimSuffix(err.Error(), ": "+errdefs.ErrInvalidArgument.Error()))
		}
		n, err := item.count()
		if err != nil || n > maxPool {
			return nil, invalid("scm.pool: %s=%s: give a number of regions from 0 to %d", item.Name, item.Value, maxPool)
		}
		if pool[size] += n; pool[size] != n {
			return nil, invalid("scm.pool: %s is there twice; name each size once", item.Name)
		}
	}
	return pool, nil
}

// HookPath is that of the hook, for a daemon whose program is self.
func (s SCM) HookPath(self string) string {
	return cmp.Or(s.Hook, filepath.Join(filepath.Dir(self), "nhybrid-scm-hook"))
}
