// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/nhybrid/nhybrid/placement"
)

const (
	// A mount's options share one page of 4096 bytes, and a root filesystem names up to five paths in it.
	maxRoot = 255
	// unix(7): sun_path holds 108 bytes with the closing NUL.
	maxSocket = 107
	// A part of a file is 64 KiB.
	leastPart = 128 << 10
	// Unpackers beyond this number would wait for one another on any machine, and each of them takes memory.
	maxUnpackers = 256
)

// Check tells what is wrong with c without touching the machine: the first fault, in one line with its cure.
func (c Config) Check() error {
	if c.Version != Version {
		return invalid("version: %d is not known; this nhybrid reads version %d", c.Version, Version)
	}
	for _, p := range []struct{ key, path string }{{"root", c.Root}, {"nvm_root", c.NVMRoot}, {"state", c.State}} {
		if err := checkRoot(p.key, p.path); err != nil {
			return err
		}
	}
	switch {
	case c.Root == c.NVMRoot:
		return invalid("nvm_root: is the same directory as root; give each tier its own, each on its own filesystem")
	case within(c.Root, c.NVMRoot):
		return invalid("nvm_root: %q lies inside root %q; give each tier a directory of its own", c.NVMRoot, c.Root)
	case within(c.NVMRoot, c.Root):
		return invalid("root: %q lies inside nvm_root %q; give each tier a directory of its own", c.Root, c.NVMRoot)
	case c.State == c.Root || c.State == c.NVMRoot:
		return invalid("state: %q is the directory of a tier; give it a directory of its own", c.State)
	}
	for _, s := range []struct{ key, path string }{
		{"address", c.Address}, {"control_address", c.ControlAddress}, {"containerd.address", c.Containerd.Address},
	} {
		if err := checkSocket(s.key, s.path); err != nil {
			return err
		}
	}
	if c.Address == c.ControlAddress || c.Address == c.Containerd.Address || c.ControlAddress == c.Containerd.Address {
		return invalid("address, control_address and containerd.address must be three different sockets")
	}
	for _, dir := range filepath.SplitList(c.Containerd.Hosts) {
		if !filepath.IsAbs(dir) {
			return invalid("containerd.hosts: %q is relative; give absolute paths of directories, separated by colons", dir)
		}
	}
	if err := checkMetrics(c.MetricsAddress); err != nil {
		return err
	}
	if _, err := logrus.ParseLevel(c.LogLevel); err != nil {
		return invalid("log_level: %q is none of trace, debug, info, warn, error, fatal, panic", c.LogLevel)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return invalid("log_format: %q is neither text nor json", c.LogFormat)
	}
	if err := checkPolicy(c.Placement.Policy); err != nil {
		return err
	}
	if err := c.Hot.check(); err != nil {
		return err
	}
	if err := c.checkSCM(); err != nil {
		return err
	}
	if err := checkProcessors(c.StreamProcessors); err != nil {
		return err
	}
	for _, d := range []struct {
		key string
		d   Duration
	}{
		{"containerd.timeout", c.Containerd.Timeout}, {"placement.poll_interval", c.Placement.PollInterval},
		{"hot.quiet", c.Hot.Quiet}, {"hot.window", c.Hot.Window},
	} {
		if time.Duration(d.d) < time.Millisecond { // a bare number in the file counts as nanoseconds
			return invalid("%s: %v is too short; give a number with a unit of ms, s, m or h", d.key, d.d)
		}
	}
	switch {
	case c.Placement.HDDRate < 0:
		return invalid("placement.hdd_rate: is negative; give a rate such as \"140MB/s\", or \"0\"")
	case c.Unpack.Concurrency < 1 || c.Unpack.Concurrency > maxUnpackers:
		return invalid("unpack.concurrency: %d is not a number of layers from 1 to %d", c.Unpack.Concurrency, maxUnpackers)
	case c.Unpack.MaxBytes.Percent != 0 || c.Unpack.MaxBytes.Bytes < 1:
		return invalid("unpack.max_bytes: %s is not a size; give one such as \"1TiB\"", c.Unpack.MaxBytes)
	case c.Unpack.MaxMetadata.Percent != 0 || c.Unpack.MaxMetadata.Bytes < 1:
		return invalid("unpack.max_metadata: %s is not a size; give one such as \"1GiB\"", c.Unpack.MaxMetadata)
	case c.Background.WriteBackRate < 0:
		return invalid("background.write_back_rate: is negative; give a rate such as \"50MB/s\", or \"0\"")
	case c.Snapshot.UpperTier != "nvm" && c.Snapshot.UpperTier != "hdd":
		return invalid("snapshot.upper_tier: %q is neither nvm nor hdd", c.Snapshot.UpperTier)
	case c.Background.Workers < 1:
		return invalid("background.workers: %d is too few; at least 1 is needed", c.Background.Workers)
	}
	return nil
}

// checkProcessors refuses what would have programs run without end, each on the output of another.
func checkProcessors(all map[string]StreamProcessor) error {
	returns := map[string]string{} // by what is accepted
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p := all[name]
		if len(p.Accepts) == 0 || p.Returns == "" || p.Path == "" {
			return invalid("stream_processors.%s: needs accepts (media types), returns (a media type) and path (of a program)", name)
		}
		for _, a := range p.Accepts {
			if _, twice := returns[a]; twice {
				return invalid("stream_processors.%s: another program accepts %q, too; name one for each media type", name, a)
			}
			returns[a] = p.Returns
		}
	}
	for from := range returns {
		at := from
		for range returns {
			if next, more := returns[at]; more {
				at = next
			}
		}
		if _, more := returns[at]; more {
			return invalid("stream_processors: what the programs for %q return goes round in a circle and never is a layer", from)
		}
	}
	return nil
}

func (h Hot) check() error {
	switch {
	case h.Predict != "files" && h.Predict != "layers" && h.Predict != "off":
		return invalid("hot.predict: %q is none of files, layers, off", h.Predict)
	case h.Rate < 0:
		return invalid("hot.rate: is negative; give a rate such as \"50MB/s\", or \"0\"")
	case h.Operations < 0:
		return invalid("hot.operations: %d is negative; give a number of files a second, or 0", h.Operations)
	case h.HighWatermark < 1 || h.HighWatermark > 100:
		return invalid("hot.high_watermark: %d is not a share from 1 to 100 per cent", h.HighWatermark)
	case h.LowWatermark < 1 || h.LowWatermark > h.HighWatermark:
		return invalid("hot.low_watermark: %d is not a share from 1 per cent to high_watermark, %d", h.LowWatermark, h.HighWatermark)
	case h.Parts.Percent != 0 || (h.Parts.Bytes != 0 && h.Parts.Bytes < leastPart):
		return invalid("hot.parts: %s is not a size from %s on; give one such as \"256KiB\", or \"0\"", h.Parts, FormatSize(leastPart))
	}
	for host := range strings.SplitSeq(h.PlainHTTP, ",") {
		if h.PlainHTTP != "" && (strings.TrimSpace(host) == "" || strings.Contains(host, "/")) {
			return invalid("hot.plain_http: %q is not a list of host:port, separated by commas", h.PlainHTTP)
		}
	}
	return nil
}

func checkRoot(key, path string) error {
	switch {
	case path == "":
		return invalid("%s: is empty; give the absolute path of a directory", key)
	case !filepath.IsAbs(path):
		return invalid("%s: %q is relative; give an absolute path", key, path)
	case filepath.Clean(path) != path:
		return invalid("%s: write %q as %q", key, path, filepath.Clean(path))
	case path == "/":
		return invalid("%s: \"/\" cannot be a tier; give a directory of its own", key)
	case strings.ContainsAny(path, ":,\\\"\n\x00"):
		// overlayfs takes its options apart at these.
		return invalid("%s: %q holds one of : , \\ \" which mount options cannot carry; choose another path", key, path)
	case len(path) > maxRoot:
		return invalid("%s: is longer than %d bytes; choose a shorter path", key, maxRoot)
	}
	return nil
}

func checkSocket(key, path string) error {
	switch {
	case path == "":
		return invalid("%s: is empty; give the absolute path of a unix socket", key)
	case !filepath.IsAbs(path):
		return invalid("%s: %q is relative; give the absolute path of a unix socket, without unix://", key, path)
	case len(path) > maxSocket:
		return invalid("%s: is longer than %d bytes, which no unix socket may be; choose a shorter path", key, maxSocket)
	}
	return nil
}

func checkMetrics(address string) error {
	if address == "" {
		return nil
	}
	if filepath.IsAbs(address) {
		return checkSocket("metrics_address", address)
	}
	if _, port, err := net.SplitHostPort(address); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return nil
		}
	}
	return invalid("metrics_address: %q is neither host:port nor the absolute path of a unix socket", address)
}

func checkPolicy(policy string) error {
	if _, err := placement.ParsePolicy(policy); err != nil {
		return invalid("placement.policy: %s", strings.TrimSuffix(err.Error(), ": "+errdefs.ErrInvalidArgument.Error()))
	}
	return nil
}

// within tells if child lies below parent; both are clean and absolute.
func within(parent, child string) bool { return strings.HasPrefix(child, parent+"/") }
