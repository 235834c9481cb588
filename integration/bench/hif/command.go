// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package hif measures what hot image files are worth: complete traces, NVM saved, second cold starts that touch no disk,
// first ones after an analysis or with a profile from elsewhere, against containerd's overlayfs snapshotter with everything
// on NVM or on HDD. docs/bench.md says what the figures mean.
package hif

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/placement"
)

// parts of the measurement, which --skip can leave out.
const (
	partImages = "images"
	partSaved  = "saved"
	partFirst  = "first"
	partCrowds = "crowds"
	partCosts  = "costs"
	partCurve  = "curve"
)

var parts = []string{partImages, partSaved, partFirst, partCrowds, partCosts, partCurve}

// options of the command.
type options struct {
	out, bin, logs, cache, svg    string
	images, first, many, skip     []string
	twenty, curve, link           string
	starts, hddStarts, containers int
	idle                          time.Duration
	quick, fresh, check           bool
	dropCaches                    bool
}

// Command is the subcommand.
func Command() *cobra.Command {
	o := &options{}
	c := &cobra.Command{
		Use: "hif", Short: "Hot image files: NVM saved, second cold starts, traces, profiles (out/hif.json)", Args: cobra.NoArgs,
		Long: "Start images built of Debian packages, cold, with nhybrid and with containerd's overlayfs snapshotter on emulated devices.\n" +
			"An interrupted measurement goes on where it was.",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.complete(c); err != nil {
				return err
			}
			err := o.run(c.Context(), c.ErrOrStderr())
			if err != nil && c.Context().Err() != nil {
				return fmt.Errorf("interrupted; the same command goes on where it was (%w)", err)
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.out, "out", "out", "directory of the results")
	f.StringVar(&o.svg, "svg", "", "where the picture of NVM occupancy is written (default nvm-occupancy.svg in the directory of the results)")
	f.StringVar(&o.bin, "bin", "", "directory of the programs (default: bin/ of the repository)")
	f.StringVar(&o.cache, "cache", "", "directory of built images (default: $NHYBRID_CACHE, or out/cache of the repository)")
	f.StringVar(&o.logs, "logs", "", "directory for the daemon's log of every image (default: none are kept)")
	f.StringSliceVar(&o.images, "images", nil, "images to measure (default all)")
	f.StringSliceVar(&o.first, "first", []string{"postgres", "mariadb", "php", "tomcat", "django", "zookeeper"},
		"images for first starts with what is known of them; those with their largest layer below are on NVM whatever is known")
	f.StringSliceVar(&o.many, "many", []string{"redis", "memcached", "influxdb", "nginx", "httpd", "haproxy", "registry", "eclipse-mosquitto", "debian", "postgres"},
		"images that are started at once, one container each")
	f.StringVar(&o.twenty, "twenty", "nginx", "image of which many containers are started at once")
	f.IntVar(&o.containers, "containers", 20, "how many")
	f.StringVar(&o.curve, "curve", "postgres", "image of the picture")
	f.StringVar(&o.link, "link", "200Mbit", "rate of the link of first starts with what is known; it decides which layers go to HDD")
	f.IntVar(&o.starts, "starts", 5, "second cold starts of each image")
	f.IntVar(&o.hddStarts, "hdd-starts", 1, "how many of them with overlayfs on HDD too")
	f.DurationVar(&o.idle, "idle", time.Minute, "how long the idle daemon is watched")
	f.StringSliceVar(&o.skip, "skip", nil, "parts to leave out: "+strings.Join(parts, ", "))
	f.BoolVar(&o.quick, "quick", false, "three tiny images, fewer repetitions: to try the benchmark itself")
	f.BoolVar(&o.dropCaches, "drop-caches", true, "empty the machine's page cache before each start")
	f.BoolVar(&o.check, "check", false, "only start every image once, warm, with overlayfs, and say if it gets ready")
	f.BoolVar(&o.fresh, "fresh", false, "forget the measurements of earlier, interrupted runs")
	return c
}

// quickDefaults are the flags of --quick where nothing else is said.
var quickDefaults = map[string]string{
	"images": "busybox,eclipse-mosquitto,registry", "first": "registry", "many": "busybox,eclipse-mosquitto,registry", "twenty": "eclipse-mosquitto",
	"containers": "4", "curve": "registry", "link": "1Gbit", "starts": "1", "idle": "1s",
}

// complete fills what follows from other flags and finds what is wrong before anything is built or pulled.
func (o *options) complete(c *cobra.Command) error {
	if o.quick {
		for name, value := range quickDefaults {
			if !c.Flags().Changed(name) {
				if err := c.Flags().Set(name, value); err != nil {
					return err
				}
			}
		}
	}
	if o.svg == "" {
		o.svg = o.out + "/nvm-occupancy.svg"
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"starts", o.starts}, {"containers", o.containers}} {
		if n.value < 1 {
			return fmt.Errorf("--%s %d: must be at least 1", n.flag, n.value)
		}
	}
	if o.hddStarts < 0 || o.hddStarts > o.starts {
		return fmt.Errorf("--hdd-starts %d: must be between 0 and --starts", o.hddStarts)
	}
	if _, err := placement.ParseRate(o.link); err != nil {
		return fmt.Errorf("--link: %w", err)
	}
	_, err := lab.Choose("part for --skip", o.skip, parts)
	return err
}

func (o *options) does(part string) bool { return !slices.Contains(o.skip, part) }

// bench is a measurement under way.
type bench struct {
	options     *options
	dir         string // scratch
	bin         string // copies of the programs, in memory
	registryDir string
	deviceSize  int64
	known       map[string]catalog.Image
	order       []string // of the catalog
	images      map[string]v1.Image
	setting     string
	progress    io.Writer
	begun       time.Time
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "%s  %s\n", time.Since(b.begun).Round(time.Second), fmt.Sprintf(format, args...))
}

var errNotReady = errors.New("not every image got ready")
