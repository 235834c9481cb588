// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"encoding/csv"
	"os"
	"strconv"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

func TestSteps(t *testing.T) {
	for step, want := range map[string]Kind{
		// Of images on Docker Hub, as their histories tell them.
		"RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl wget && rm -rf /var/lib/apt/lists/*": SystemLayer,
		"RUN apt-get update && apt-get install -y nodejs --no-install-recommends && rm -rf /var/lib/apt/lists/*":                    EngineLayer,
		`RUN set -x && apt-get update && apt-get install -y openjdk-8-jdk="$JAVA_DEBIAN_VERSION" ca-certificates-jav...`:            EngineLayer,
		"RUN set -x && apt-get update && apt-get install -y ${MONGO_PACKAGE}=$MONGO_VERSION ${MONGO_PACKAGE}-server=...":            EngineLayer,
		"RUN apk add --no-cache bash python su-exec":                                                                     EngineLayer,
		"RUN apt-get update && apt-get install -y $PHPIZE_DEPS ca-certificates curl xz-utils --no-install":               SystemLayer,
		`RUN gem install rails --version "$RAILS_VERSION"`:                                                               ApplicationLayer,
		`RUN npm install -g "ghost-cli@$GHOST_CLI_VERSION"`:                                                              ApplicationLayer,
		`RUN wget -N $CB_RELEASE_URL/$CB_VERSION/$CB_PACKAGE && echo "$CB_SHA256 $CB_PACKAGE" | sha256sum -c - && dp...`: ApplicationLayer,
		"RUN groupadd -r mysql && useradd -r -g mysql mysql":                                                             OtherLayer,
		"RUN mkdir /docker-entrypoint-initdb.d":                                                                          OtherLayer,
		"RUN ln -s usr/local/bin/docker-entrypoint.sh / # backwards compat":                                              OtherLayer,
		"RUN apt-key adv --keyserver keys.gnupg.net --recv-keys 3B87619DF812A63A8C1005C30742918E5C8DA04A":                OtherLayer,
		"COPY file:9c29fbe8 in /usr/local/bin/":                                                                          ApplicationLayer,
		"COPY dir:c3faa196 in ./config":                                                                                  ApplicationLayer,
		"COPY file:d8282341 in /etc/ssl/certs/":                                                                          SystemLayer,
		"WORKDIR /data":                                                                                                  OtherLayer,
		// The same as builders write them.
		"/bin/sh -c apt-get update && apt-get install -y python3":                     EngineLayer,
		"RUN /bin/sh -c pip install --no-cache-dir -r requirements.txt # buildkit":    ApplicationLayer,
		"|1 VERSION=1 /bin/sh -c make install":                                        EngineLayer,
		"/bin/sh -c #(nop) COPY dir:1 in /app ":                                       ApplicationLayer,
		`/bin/sh -c #(nop)  CMD ["nginx" "-g" "daemon off;"]`:                         OtherLayer,
		"RUN /bin/bash -o pipefail -c curl -fsSL https://example.org/a.tgz | tar -xz": ApplicationLayer,
		"": OtherLayer,
	} {
		require.Equal(t, want, stepKind(step, false), step)
	}
}

func TestLayersOfSmallImages(t *testing.T) {
	base, copied := v1.History{CreatedBy: "/bin/sh -c #(nop) ADD file:1 in / "}, v1.History{CreatedBy: "COPY /server /server # buildkit"}
	empty := v1.History{CreatedBy: "ENV A=1", EmptyLayer: true}
	require.Equal(t, []Kind{ApplicationLayer}, Layers([]v1.History{base, empty}, 1), "all there is")
	require.Equal(t, []Kind{SystemLayer, ApplicationLayer}, Layers([]v1.History{base, empty, copied}, 2))
	require.Equal(t, []Kind{ApplicationLayer}, Layers([]v1.History{copied}, 1))
	require.Equal(t, []Kind{SystemLayer, ApplicationLayer}, Layers(nil, 2), "no history")
	require.Equal(t, []Kind{ApplicationLayer}, Layers([]v1.History{copied, copied}, 1), "more history than layers")
	require.Empty(t, Layers(nil, 0))
}

// TestLayersOfDockerHub takes the 142 images of Docker Hub of 2018 that the policy of placement is simulated with.
func TestLayersOfDockerHub(t *testing.T) {
	f, err := os.Open("../../placement/testdata/hub-2018-layers.csv")
	require.NoError(t, err)
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	require.NoError(t, err)
	histories, sizes := map[string][]v1.History{}, map[string][]int64{}
	for _, row := range rows[1:] {
		n, err := strconv.ParseInt(row[6], 10, 64)
		require.NoError(t, err)
		histories[row[1]] = append(histories[row[1]], v1.History{CreatedBy: row[8]})
		sizes[row[1]] = append(sizes[row[1]], n)
	}
	var hot, all int64
	for name, h := range histories {
		kinds := Layers(h, len(h))
		require.Len(t, kinds, len(h))
		some := false
		for i, k := range kinds {
			all += sizes[name][i]
			if k.Hot() {
				some = true
				hot += sizes[name][i]
			}
		}
		require.True(t, some, "%s: nothing would be hot", name)
		if len(h) > 1 && kinds[0].Hot() && h[0].CreatedBy[:3] == "ADD" {
			for _, k := range kinds[1:] {
				require.False(t, k.Hot(), "%s: the distribution is hot beside others", name)
			}
		}
	}
	t.Logf("%d images: %.1f of %.1f GB compressed are in layers with the engine or the application", len(histories), float64(hot)/1e9, float64(all)/1e9)
	require.InDelta(t, 0.55, float64(hot)/float64(all), 0.2, "most is neither all nor nothing")
}
