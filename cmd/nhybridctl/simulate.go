// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) simulate() *cobra.Command {
	var file, nvmSize, model string
	var images bool
	o := placement.DefaultOptions()
	var commit, blobCommit time.Duration
	rates := map[string]*float64{"bandwidth": &o.Bandwidth, "nvm-write": &o.NVMWrite, "hdd-write": &o.HDDWrite, "unpack": &o.Unpack}
	c := &cobra.Command{
		Use: "simulate --layers FILE.csv", Short: "Replay pulls of a table of layers with the daemon's own policies", Args: cobra.NoArgs,
		Long: `Replay the pull of each image of a table of layers and compare what the policies put on NVM and when the image is
durable. The table is CSV with a header line; image, layer_index and compressed_bytes are needed. - reads the standard input.

Two models say what a pull is:
  paper     layers are unpacked after they have arrived, each on one tier: the snapshotters of containerd, and the N-Docker paper
  one-pass  layers are unpacked while they arrive, placed by the file or by the layer as the policy has it: nhybrid`,
		RunE: func(c *cobra.Command, _ []string) error {
			if file == "" {
				return usage("simulate: --layers FILE.csv is missing")
			}
			for name, rate := range rates {
				v, err := placement.ParseRate(c.Flag(name).Value.String())
				if err != nil {
					return usage(fmt.Sprintf("simulate: --%s: %s", name, control.ErrorMessage(err)))
				}
				*rate = v
			}
			if nvmSize != "" {
				n, err := config.ParseSize(nvmSize)
				if err != nil {
					return usage("simulate: --nvm-size: " + err.Error())
				}
				o.NVMSize = n
			}
			if _, err := placement.ParsePolicy(o.Policy); err != nil {
				return usage("simulate: --policy: " + control.ErrorMessage(err))
			}
			if o.Concurrent < 1 || o.Unpacks < 1 {
				return usage("simulate: --concurrent and --unpacks must be at least 1")
			}
			if !(o.Cores > 0) {
				return usage("simulate: --cores must be above 0")
			}
			o.Commit, o.BlobCommit = commit.Seconds(), blobCommit.Seconds()
			if o.Commit < 0 || o.BlobCommit < 0 {
				return usage("simulate: --commit and --blob-commit must not be negative")
			}
			if !(o.Hot >= 0 && o.Hot <= 1) {
				return usage("simulate: --hot must lie between 0 and 1")
			}
			if !slices.Contains(models, model) {
				return usage(fmt.Sprintf("simulate: --model %q: choose one of %s", model, strings.Join(models, ", ")))
			}
			table, err := a.readLayers(file, c.InOrStdin())
			if err != nil {
				return err
			}
			var report interface {
				WriteTable(w io.Writer, images bool) error
			}
			if model == onePass {
				report, err = placement.SimulateOnePass(table, o)
			} else {
				report, err = placement.Simulate(table, o)
			}
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(report)
			}
			return report.WriteTable(a.out, images)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "layers", "", "table of layers")
	f.String("bandwidth", "100Mbit", "rate of the link")
	f.String("nvm-write", "1.3GB/s", "write rate of the NVM")
	f.String("hdd-write", "140MB/s", "write rate of the HDD")
	f.String("unpack", "150MB/s", "rate at which one layer is unpacked, in uncompressed bytes")
	f.IntVar(&o.Concurrent, "concurrent", o.Concurrent, "downloads at a time")
	f.StringVar(&model, "model", paper, "what a pull is: "+strings.Join(models, ", "))
	f.IntVar(&o.Unpacks, "unpacks", o.Unpacks, "layers unpacked at a time; model paper: for parallel unpacking")
	f.Float64Var(&o.Cores, "cores", o.Cores, "CPU cores that unpack (model one-pass)")
	f.DurationVar(&commit, "commit", seconds(o.Commit), "containerd's commit of a layer (model one-pass)")
	f.DurationVar(&blobCommit, "blob-commit", seconds(o.BlobCommit), "containerd's commit of a blob (model one-pass)")
	f.BoolVar(&o.ContentOnHDD, "content-on-hdd", o.ContentOnHDD, "containerd's blobs stand on the HDD too (model one-pass)")
	f.Float64Var(&o.Hot, "hot", o.Hot, "share of the files that are known to be hot, 0 to 1 (model one-pass)")
	f.StringVar(&nvmSize, "nvm-size", "", "bytes free on NVM before each pull (default no limit)")
	f.StringVar(&o.Policy, "policy", o.Policy, strings.Join(placement.PolicyNames, ", "))
	f.BoolVar(&images, "images", false, "show each image too")
	_ = c.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions(placement.PolicyNames, cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	_ = c.RegisterFlagCompletionFunc("model", cobra.FixedCompletions(models, cobra.ShellCompDirectiveNoFileComp))
	return c
}

const (
	paper   = "paper"
	onePass = "one-pass"
)

var models = []string{paper, onePass}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// readLayers shows a progress bar while it reads, on a terminal: a table may have millions of rows.
func (a *app) readLayers(file string, stdin io.Reader) ([]placement.Image, error) {
	in, size := stdin, int64(-1)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read table of layers: %w", err)
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil {
			size = info.Size()
		}
		in = f
	}
	if _, _, ok := terminal(a.errs); ok {
		bar := progressbar.NewOptions64(size, progressbar.OptionSetWriter(a.errs), progressbar.OptionShowBytes(true),
			progressbar.OptionSetDescription("reading"), progressbar.OptionClearOnFinish())
		defer bar.Finish() //nolint:errcheck // an ornament
		in = io.TeeReader(in, bar)
	}
	return placement.ReadLayers(in)
}
