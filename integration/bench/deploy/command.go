// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package deploy measures how long pulls take with nhybrid and with containerd's overlayfs snapshotter, on emulated
// devices and through a slow link, and what else nhybrid costs. docs/bench.md says what the figures mean.
package deploy

import (
	"fmt"
	"io"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
)

const (
	full  = "full"
	small = "small"
)

// parts of the measurement, which --skip can leave out.
const (
	partPull     = "pull"
	partPrepare  = "prepare"
	partMetadata = "metadata"
	partHot      = "hot"
)

var parts = []string{partPull, partPrepare, partMetadata, partHot}

// options of the command.
type options struct {
	out, bin, logs, cache            string
	size                             string
	images, links, variants, skip    []string
	rounds, repetitions, afterRounds int
	captureFiles                     []int
	idle                             time.Duration
	dropCaches, fresh                bool
}

// Command is the subcommand.
func Command() *cobra.Command {
	o := &options{}
	c := &cobra.Command{
		Use: "deploy", Short: "Pulls, container preparation, and the cost of metadata (out/deploy.json)", Args: cobra.NoArgs,
		Long: "Pull images built of Debian packages through a slow link onto an emulated HDD and an emulated NVM, with nhybrid and with\n" +
			"containerd's overlayfs snapshotter in turn. An interrupted measurement goes on where it was.",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
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
	f.StringVar(&o.bin, "bin", "", "directory of the programs (default: bin/ of the repository)")
	f.StringVar(&o.cache, "cache", "", "directory of built images (default: $NHYBRID_CACHE, or out/cache of the repository)")
	f.StringVar(&o.logs, "logs", "", "directory for the logs of every run (default: none are kept)")
	f.StringVar(&o.size, "size", full, "images: full (Debian packages) or small (generated, for a try)")
	f.StringSliceVar(&o.images, "images", nil, strings.Join(imageNames, ", ")+" (default all)")
	f.StringSliceVar(&o.links, "links", []string{"100Mbit", "1Gbit"}, "bandwidths of the link; 0: no limit")
	f.StringSliceVar(&o.variants, "variants", nil, strings.Join(variantNames(), ", ")+" (default all but the last two)")
	f.StringSliceVar(&o.skip, "skip", nil, "parts to leave out: "+strings.Join(parts, ", "))
	f.IntVar(&o.rounds, "rounds", 5, "how often each pull is measured")
	f.IntVar(&o.afterRounds, "after-rounds", 1, "in how many rounds the daemon's idle memory and the copying to HDD are measured too")
	f.DurationVar(&o.idle, "idle", 5*time.Second, "quiet time before the daemon's idle memory is read")
	f.IntVar(&o.repetitions, "repetitions", 200, "how often a container is prepared with each snapshotter")
	f.IntSliceVar(&o.captureFiles, "capture-files", []int{10_000, 100_000, 1_000_000}, "numbers of files of the layers that are stored and removed")
	f.BoolVar(&o.dropCaches, "drop-caches", true, "empty the machine's page cache before each pull")
	f.BoolVar(&o.fresh, "fresh", false, "forget the runs of earlier, interrupted measurements")
	return c
}

// check finds what is wrong with the flags before anything is built or pulled.
func (o *options) check() error {
	if o.size != full && o.size != small {
		return fmt.Errorf("--size %q: must be %s or %s", o.size, full, small)
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"rounds", o.rounds}, {"repetitions", o.repetitions}} {
		if n.value < 1 {
			return fmt.Errorf("--%s %d: must be at least 1", n.flag, n.value)
		}
	}
	for _, n := range o.captureFiles {
		if n < 1 {
			return fmt.Errorf("--capture-files %d: must be at least 1", n)
		}
	}
	for _, l := range o.links {
		if _, err := linkRate(l); err != nil {
			return fmt.Errorf("--links: %w", err)
		}
	}
	_, err := lab.Choose("part for --skip", o.skip, parts)
	return err
}

// bench is a measurement under way.
type bench struct {
	options     *options
	dir         string // scratch
	bin         string // copies of the programs
	registryDir string
	sizes       sizes
	images      map[string]v1.Image
	layers      map[string][]v1.Descriptor
	data        map[string][]int64   // bytes of the files of each layer, by image
	links       map[key]lab.LinkRate // by round, image and link
	settings    map[string]string    // by image
	progress    io.Writer
	begun       time.Time
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "%s  %s\n", time.Since(b.begun).Round(time.Second), fmt.Sprintf(format, args...))
}
