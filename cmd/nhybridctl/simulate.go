// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
)

func (a *app) simulate() *cobra.Command {
	var file, nvmSize string
	var images bool
	o := placement.DefaultOptions()
	rates := map[string]*float64{"bandwidth": &o.Bandwidth, "nvm-write": &o.NVMWrite, "hdd-write": &o.HDDWrite, "unpack": &o.Unpack}
	c := &cobra.Command{
		Use: "simulate --layers FILE.csv", Short: "Replay pulls of a table of layers with the daemon's own policies", Args: cobra.NoArgs,
		Long: "Replay the pull of each image of a table of layers and compare what the policies put on NVM and when the image is\ndurable. The table is CSV with a header line; image, layer_index and compressed_bytes are needed. - reads the standard input.",
		RunE: func(c *cobra.Command, _ []string) error {
			if file == "" {
				return usage("simulate: --layers FILE.csv is missing")
			}
			for name, rate := range rates {
				v, err := placement.ParseRate(c.Flag(name).Value.String())
				if err != nil {
					return usage(fmt.Sprintf("simulate: --%s: %s", name, plain(err)))
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
				return usage("simulate: --policy: " + plain(err))
			}
			if o.Concurrent < 1 || o.Unpacks < 1 {
				return usage("simulate: --concurrent and --unpacks must be at least 1")
			}
			table, err := a.readLayers(file, c.InOrStdin())
			if err != nil {
				return err
			}
			report, err := placement.Simulate(table, o)
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
	f.IntVar(&o.Unpacks, "unpacks", o.Unpacks, "layers unpacked at a time, for parallel unpacking")
	f.StringVar(&nvmSize, "nvm-size", "", "bytes free on NVM before each pull (default no limit)")
	f.StringVar(&o.Policy, "policy", o.Policy, strings.Join(placement.PolicyNames, ", "))
	f.BoolVar(&images, "images", false, "show each image too")
	_ = c.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions(placement.PolicyNames, cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	return c
}

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
