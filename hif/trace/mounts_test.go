// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
)

func TestOverlayOf(t *testing.T) {
	for options, want := range map[string][2]string{
		"rw,lowerdir=/run/t/7::/nvm/d::/hdd/d,upperdir=/nvm/s/8/fs,workdir=/nvm/s/8/work": {"/run/t/7", "/nvm/s/8/fs"},
		"ro,lowerdir=/run/t/7::/nvm/d::/hdd/d,redirect_dir=on":                            {"/run/t/7", ""},
		"ro,lowerdir+=/run/t/7,datadir+=/nvm/d,datadir+=/hdd/d":                           {"/run/t/7", ""},
		`rw,lowerdir=/run/a\040b::/nvm/d,upperdir=/u\040v`:                                {"/run/a b", "/u v"},
		"rw,lowerdir=/l1:/l2,upperdir=/u":                                                 {"/l1", "/u"},
		"rw":                                                                              {"", ""},
	} {
		o := overlayOf(&mountinfo.Info{VFSOptions: options})
		require.Equal(t, want, [2]string{o.tree, o.upper}, options)
	}
}
