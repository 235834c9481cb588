// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"cmp"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Foresee tells what Attach would refuse as things are, as far as that can be known before there is a container. It promises nothing: the container that
// comes first has it.
func (s *Store) Foresee(a api.Attach) error {
	owner := cmp.Or(a.Tenant, a.Namespace)
	if a.Volume != "" {
		ref := Ref{Volume, owner, a.Volume}
		if err := ref.check(); err != nil {
			return err
		}
		_, err := s.get(ref)
		if errdefs.IsNotFound(err) {
			err = missing(ref, err)
		}
		return err
	}
	if err := checkIdentifier("namespace", owner); err != nil {
		return err
	}
	if a.FromImage {
		return nil // it is not known yet
	}
	if err := stream.CheckSize(a.Size); err != nil {
		return err
	}
	others := s.others()
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.admits(want{namespace: owner, size: a.Size, regions: 1}, others)
	return err
}

func missing(ref Ref, err error) error {
	return fmt.Errorf("%w; make it by nhybridctl scm create -n %s %s", err, ref.Namespace, ref.Name)
}
