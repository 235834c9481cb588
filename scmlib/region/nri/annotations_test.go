// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func TestAsk(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		annotations string // lines of key=value
		want        *api.Attach
		says        string
	}{
		{"", nil, ""},
		{"app=web\nsize=1m\nexample.org/size=1m\nnotscm.nhybrid.io/size=1m\nscm.nhybrid.io.example.org/size=1m", nil, ""},
		{"scm.nhybrid.io/size=256m", &api.Attach{Size: 256 << 20}, ""},
		{"scm.nhybrid.io/size=3m\napp=web", &api.Attach{Size: 3 << 20}, ""},
		{"scm.nhybrid.io/volume=orders", &api.Attach{Volume: "orders"}, ""},
		{"scm.nhybrid.io/image=true", &api.Attach{FromImage: true}, ""},
		{"size.scm.nhybrid.io/container.web=1m", &api.Attach{Size: 1 << 20}, ""},
		{"size.scm.nhybrid.io/container.db=1m", nil, ""},
		{"scm.nhybrid.io/size=2m\nsize.scm.nhybrid.io/container.web=1m", &api.Attach{Size: 1 << 20}, ""},
		{"scm.nhybrid.io/size=2m\nvolume.scm.nhybrid.io/container.web=orders", &api.Attach{Volume: "orders"}, ""},
		{"scm.nhybrid.io/size=2m\nvolume.scm.nhybrid.io/container.db=orders", &api.Attach{Size: 2 << 20}, ""},
		{"image.scm.nhybrid.io/container.web=true\nsize.scm.nhybrid.io/container.db=1m", &api.Attach{FromImage: true}, ""},

		{"scm.nhybrid.io/size=2m\nscm.nhybrid.io/volume=orders", nil, "a container has one region"},
		{"size.scm.nhybrid.io/container.web=2m\nvolume.scm.nhybrid.io/container.web=orders", nil, "a container has one region"},
		{"scm.nhybrid.io/size=", nil, `annotation "scm.nhybrid.io/size": size ""`},
		{"scm.nhybrid.io/size=-1m", nil, `size "-1m"`},
		{"scm.nhybrid.io/size=5", nil, "size"},
		{"scm.nhybrid.io/size=9999999t", nil, "size"},
		{"size.scm.nhybrid.io/container.db=lots", nil, `annotation "size.scm.nhybrid.io/container.db"`},
		{"scm.nhybrid.io/volume=256m", nil, "taken for a size"},
		{"scm.nhybrid.io/volume=volume/orders", nil, "not the name of a volume"},
		{"scm.nhybrid.io/volume=container/web", nil, "not the name of a volume"},
		{"scm.nhybrid.io/volume=../../etc", nil, "region"},
		{"scm.nhybrid.io/image=yes", nil, `write "true"`},
		{"scm.nhybrid.io/Size=1m", nil, "known are"},
		{"scm.nhybrid.io=1m", nil, "known are"},
		{"scm.nhybrid.io/container.web=1m", nil, "known are"},
		{"size.scm.nhybrid.io=1m", nil, "known are"},
		{"size.scm.nhybrid.io/web=1m", nil, "known are"},
		{"size.scm.nhybrid.io/container.=1m", nil, "known are"},
		{"colour.scm.nhybrid.io/container.db=1m", nil, "known are"},
	} {
		annotations := map[string]string{}
		for line := range strings.Lines(c.annotations) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
			annotations[key] = value
		}
		a, err := Ask(annotations, "web")
		require.Equal(t, c.want, a, c.annotations)
		if c.says == "" {
			require.NoError(t, err, c.annotations)
			continue
		}
		require.ErrorContains(t, err, c.says, c.annotations)
		require.True(t, errdefs.IsInvalidArgument(err), c.annotations)
	}
}

func FuzzAsk(f *testing.F) {
	f.Add("scm.nhybrid.io/size", "1m", "volume.scm.nhybrid.io/container.web", "orders")
	f.Add("scm.nhybrid.io/image", "true", "scm.nhybrid.io", "")
	f.Fuzz(func(t *testing.T, key, value, key2, value2 string) {
		a, err := Ask(map[string]string{key: value, key2: value2}, "web")
		if err != nil {
			require.Nil(t, a)
			require.True(t, errdefs.IsInvalidArgument(err))
			return
		}
		if a == nil {
			return
		}
		set := 0
		for _, is := range []bool{a.Size > 0, a.Volume != "", a.FromImage} {
			if is {
				set++
			}
		}
		require.Equal(t, 1, set)
	})
}
