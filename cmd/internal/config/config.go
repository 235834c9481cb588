// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package config is the daemon's configuration: one struct that is at once the set of keys, their defaults, their
// documentation and the source of config.toml.example.
//
// A value comes from the first of these that has it: command line, environment, file, default.
package config

import (
	"bytes"
	"fmt"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

const (
	// DefaultFile is read when no file is named; it need not exist.
	DefaultFile = "/etc/nhybrid/config.toml"
	// Version is the only version of the file's layout that there is.
	Version = 1
	// DefaultControlAddress is where nhybridctl looks for the daemon.
	DefaultControlAddress = "/run/nhybrid/control.sock"
	// DefaultSCMAddress is where the hook and nhybridctl scm look for it.
	DefaultSCMAddress = api.Socket
)

// Config is the whole configuration. The zero value is not valid; begin with Default.
type Config struct {
	Version        int    `toml:"version" comment:"Layout of this file. Must be 1."`
	Root           string `toml:"root" comment:"Directory of the HDD tier: packs, the home of all image data. Absolute; created when missing."`
	NVMRoot        string `toml:"nvm_root" comment:"Directory of the NVM tier: persistent memory, or any fast disk. Absolute; the directory above it\nmust exist, since a tier that is not mounted would silently fill the filesystem below. Best on a filesystem of its own."`
	State          string `toml:"state" comment:"Directory for mount points, which need not outlive the machine's run. Absolute; best on a tmpfs.\nSeveral daemons may share it."`
	Address        string `toml:"address" comment:"Unix socket on which containerd reaches the snapshotter and the differ: the address of both its\n[proxy_plugins.nhybrid] and its [proxy_plugins.nhybrid-diff]."`
	ControlAddress string `toml:"control_address" comment:"Unix socket, mode 0600, of nhybridctl."`
	MetricsAddress string `toml:"metrics_address" comment:"Where Prometheus metrics are served: \"host:port\" or the absolute path of a unix socket. Empty: nowhere."`
	LogLevel       string `toml:"log_level" comment:"trace, debug, info, warn, error, fatal or panic."`
	LogFormat      string `toml:"log_format" comment:"text or json."`

	Containerd Containerd `toml:"containerd" comment:"How nhybrid asks containerd what it is downloading."`
	Placement  Placement  `toml:"placement" comment:"Which file of a layer goes to which tier."`
	Unpack     Unpack     `toml:"unpack" comment:"Layers are unpacked while their blobs arrive."`
	Snapshot   Snapshot   `toml:"snapshot" comment:"Writable snapshots of containers."`
	Background Background `toml:"background" comment:"Work that is done after containerd has its answer."`
	Hot        Hot        `toml:"hot" comment:"Hot image files: what starts of containers need stays on NVM, the rest goes to HDD."`
	SCM        SCM        `toml:"scm" comment:"Regions: persistent memory for containers, files on NVM that they map (docs/regions.md)."`

	StreamProcessors map[string]StreamProcessor `toml:"stream_processors,omitempty"`
}

// StreamProcessor is a program that turns layers of media types that nhybrid does not read into others, from its standard
// input to its standard output, as in containerd's configuration.
type StreamProcessor struct {
	Accepts []string `toml:"accepts"` // media types
	Returns string   `toml:"returns"` // media type
	Path    string   `toml:"path"`
	Args    []string `toml:"args"`
	Env     []string `toml:"env"`
}

// Containerd says how to reach containerd.
type Containerd struct {
	Address string   `toml:"address" comment:"containerd's own socket. Without it nothing is known of downloads: no layer is unpacked before it has arrived."`
	Timeout Duration `toml:"timeout" comment:"Longest wait for one answer of containerd; files are placed without it when the time is over."`
	Hosts   string   `toml:"hosts" comment:"Directories that describe registries, separated by colons, as in config_path of CRI and of the transfer service: mirrors,\ncertificates and headers of HOST in HOST/hosts.toml. They hold for the registries of profiles, of regions and of blobs that containerd has lost."`
}

// Placement says where layers go.
type Placement struct {
	Policy       string   `toml:"policy" comment:"drain: each file while its bytes come. Hot files go to NVM and to the pack; others to the pack as long as the disk keeps\nup with the pull, else to NVM, and the pack gets them later.\nlass: NVM for a layer whose storing starts when no other layer of its image is still downloading, else HDD (the paper's rule).\nnvm, hdd: every file on that tier.\nboundary=N: the files of layers with index N (0 = bottom) and above on NVM."`
	NVMReserve   Space    `toml:"nvm_reserve" comment:"What stays free on the NVM filesystem: bytes (\"2GiB\") or a share of its size (\"5%\").\nOf its inodes the same share stays free. A file that does not fit beside it goes to the pack on HDD; no pull fails for it."`
	HDDRate      Rate     `toml:"hdd_rate" comment:"Rate at which the HDD takes packs, for the policy drain: \"140MB/s\". \"0\": measured while running."`
	PollInterval Duration `toml:"poll_interval" comment:"How often the downloads of a running pull are looked at, beside containerd's events."`
}

// Unpack says how much the unpacker may do.
type Unpack struct {
	Concurrency int   `toml:"concurrency" comment:"Layers unpacked at a time; those that wait for their downloads do not count. Each takes up to one core, and some MB of memory. At least 1."`
	MaxBytes    Space `toml:"max_bytes" comment:"Most uncompressed bytes of one layer. The pull of an image with a larger layer fails."`
	MaxMetadata Space `toml:"max_metadata" comment:"Most memory that names and attributes of the files of one layer may take, as estimated: some hundred bytes a\nfile, and the content of small ones. The pull of an image with a layer that needs more fails."`
}

// Snapshot says how writable snapshots are kept.
type Snapshot struct {
	UpperTier  string `toml:"upper_tier" comment:"Tier of the writable directories of containers: nvm or hdd. NVM without room gives HDD.\nThe label containerd.io/snapshot/nhybrid.upper-tier of a snapshot goes before this key."`
	Xino       bool   `toml:"xino" comment:"true: the root filesystems of containers are mounted with xino=on, so that files and directories have one device, and numbers\nthat stay. The numbers take 64 bits: set false for programs of 32 bits without large-file support, whose stat(2) fails with\nEOVERFLOW. Then the space of a file that a running container has read stays in use on NVM after the file has left it."`
	SyncRemove bool   `toml:"sync_remove" comment:"true: a removal returns when the files are gone. containerd holds a lock meanwhile that stops every other\nsnapshot on the node, so this is for tests of disk space only."`
}

// Background says how much slow work may run beside pulls.
type Background struct {
	Workers       int  `toml:"workers" comment:"How many layers are packed, views made and removals done at a time. At least 1."`
	WriteBack     bool `toml:"write_back" comment:"true: files that stand on NVM alone are written into the packs on HDD in the background, so that the loss of the NVM\ndevice loses no image."`
	WriteBackRate Rate `toml:"write_back_rate" comment:"Most bytes a second that this writing may take. \"0\": no limit."`
}

// Hot says how hot files are found and moved.
type Hot struct {
	Trace         bool     `toml:"trace" comment:"true: the starts of containers are traced, and what they open is written to the profile of the image."`
	Quiet         Duration `toml:"quiet" comment:"A start is over when for so long no file was opened for the first time,"`
	Window        Duration `toml:"window" comment:"or so long after its first open, or by nhybridctl profile ready."`
	Predict       string   `toml:"predict" comment:"What an image without a profile is guessed to need: files (analysis of its command, libraries and language runtime),\nlayers (whole layers that hold an execution engine or application), off."`
	FetchProfiles bool     `toml:"fetch_profiles" comment:"true: the registry of a new image is asked for a profile, by way of containerd.hosts and with the credentials of docker's\nconfiguration of this user."`
	PlainHTTP     string   `toml:"plain_http" comment:"Registries that are asked over HTTP without TLS, as host:port, separated by commas. Those on localhost always are."`
	Migrate       bool     `toml:"migrate" comment:"true: after the first start of an image its cold files leave NVM and hot files come up. Packs keep all of them."`
	Rate          Rate     `toml:"rate" comment:"Most bytes a second that are read from the HDD for files that come up. \"0\": no limit."`
	Operations    int      `toml:"operations" comment:"Most files a second that are moved. 0: no limit."`
	HighWatermark int      `toml:"high_watermark" comment:"Per cent of NVM without the reserve above which files leave that are hot, too, those of least use first;"`
	LowWatermark  int      `toml:"low_watermark" comment:"until so much is in use. Nothing comes up above it."`
	Parts         Space    `toml:"parts" comment:"Of hot files from this size on only the parts that starts touch stay on NVM. \"0\": files stay whole.\nNeeds Linux 6.12, and an NVM filesystem without DAX."`
}

// SCM says what regions containers may have.
type SCM struct {
	Enabled bool   `toml:"enabled" comment:"true: regions are served. Nothing is made on NVM for it before somebody asks for a region."`
	Address string `toml:"address" comment:"Unix socket, mode 0600, of the hook that brings regions into containers, and of nhybridctl scm."`
	Limit   Space  `toml:"limit" comment:"Most that all regions may take of NVM: bytes, or a share of its size. \"0\": all but placement.nvm_reserve.\nWhat regions have, images do not: with less room for them, more of their files go to HDD."`
	Reserve Space  `toml:"reserve" comment:"Room of NVM that is kept for regions, whatever images need: bytes, or a share of its size. What regions have counts against it.\n\"0\": regions take what images have left, of all that limit allows."`
	Quota   Space  `toml:"quota" comment:"Most that the regions of one namespace of containerd may take, in the same way. \"0\": no limit of its own."`
	Regions int    `toml:"regions" comment:"Most regions of one namespace. 0: no limit."`
	Quotas  List   `toml:"quotas" comment:"Quotas of single namespaces, which go before quota: \"team-a=20GiB, batch=5%\"."`
	Pool    List   `toml:"pool" comment:"How many regions of a size wait, zeroed, so that containers with such a region start without delay: \"256m=4, 1g=2\".\nSizes are written as in the names of devices. They take their room on NVM, and give it up where a region needs it."`
	Keep    bool   `toml:"keep" comment:"true: the region of a container becomes a volume when its container is removed. Else it goes with it."`
	Rate    Rate   `toml:"rate" comment:"Most bytes a second that copies of regions and the filling of the pool move. \"0\": no limit."`
	CDISpec string `toml:"cdi_spec" comment:"Where the CDI specification is written that lets containers ask for regions: a name that ends in .json in a directory\nwhere container runtimes look, /etc/cdi or /var/run/cdi. Empty: nowhere; then only processes of the host get regions."`
	CDIKind string `toml:"cdi_kind" comment:"Kind of its devices, vendor/class. A second daemon on a machine needs a kind of its own."`
	Hook    string `toml:"hook" comment:"Absolute path of nhybrid-scm-hook. Empty: beside the program of the daemon. Without it no specification is written."`

	NRI       bool   `toml:"nri" comment:"true: annotations scm.nhybrid.io/… of pods ask for regions, where containerd has NRI (docs/regions.md).\nOf several daemons on a machine only one may say so: NRI fails a container that two plugins change in the same place."`
	NRISocket string `toml:"nri_socket" comment:"Unix socket on which containerd waits for plugins of NRI."`
}

// Default is the configuration of a daemon that was told nothing.
func Default() Config {
	return Config{
		Version:        Version,
		Root:           "/var/lib/nhybrid",
		NVMRoot:        "/mnt/nvm/nhybrid",
		State:          "/run/nhybrid/state",
		Address:        "/run/nhybrid/nhybrid.sock",
		ControlAddress: DefaultControlAddress,
		LogLevel:       "info",
		LogFormat:      "text",
		Containerd: Containerd{
			Address: "/run/containerd/containerd.sock",
			Timeout: Duration(defaultTimeout),
			Hosts:   "/etc/containerd/certs.d:/etc/docker/certs.d",
		},
		Placement: Placement{
			Policy:       "drain",
			NVMReserve:   Space{Percent: 5},
			PollInterval: Duration(defaultPoll),
		},
		Unpack:     Unpack{Concurrency: 4, MaxBytes: Space{Bytes: 1 << 40}, MaxMetadata: Space{Bytes: 1 << 30}},
		Snapshot:   Snapshot{UpperTier: "nvm", Xino: true},
		Background: Background{Workers: 2, WriteBack: true, WriteBackRate: 50_000_000},
		Hot: Hot{
			Trace: true, Quiet: Duration(5 * time.Second), Window: Duration(time.Minute),
			Predict: "files", FetchProfiles: true,
			Migrate: true, Rate: 50_000_000, Operations: 2000, HighWatermark: 90, LowWatermark: 80,
			Parts: Space{Bytes: 256 << 10},
		},
		// On: a region is made only where somebody who may start containers asks for one, and half of NVM stays the images' whatever they ask.
		SCM: SCM{
			Enabled: true, Address: DefaultSCMAddress, Limit: Space{Percent: 50}, Rate: 200_000_000,
			CDISpec: "/etc/cdi/nhybrid-scm.json", CDIKind: api.Kind,
			NRI: true, NRISocket: "/var/run/nri/nri.sock",
		},
	}
}

const header = `# Configuration of containerd-nhybrid-grpc.
#
# Every key may be left out; what stands here is its default. The command line goes before the environment, the
# environment before this file. The variable of a key is NHYBRID_ and its name in capitals, with _ for each dot:
# NHYBRID_NVM_ROOT, NHYBRID_PLACEMENT_POLICY. On the command line every key can be given as --set key=value.
# Sizes are bytes or have a unit: kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024).
# Durations have a unit too: ms, s, m, h.

`

const footer = `
# Programs for layers of media types that nhybrid does not read, encrypted ones for example, as in containerd's own
# configuration: from standard input to standard output, until what they return is a layer. Such layers are unpacked after
# their download. Only in this file.
#
# [stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
# accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
# returns = "application/vnd.oci.image.layer.v1.tar+gzip"
# path = "ctd-decoder"
# args = ["--decryption-keys-path", "/etc/containerd/ocicrypt/keys"]
# env = ["OCICRYPT_KEYPROVIDER_CONFIG=/etc/containerd/ocicrypt/ocicrypt_keyprovider.conf"]
`

// Marshal gives c as a TOML file with the meaning of each key in a comment above it.
func (c Config) Marshal() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(header)
	if err := toml.NewEncoder(&b).SetIndentTables(false).Encode(c); err != nil {
		return nil, fmt.Errorf("marshal configuration: %w", err)
	}
	b.WriteString(footer)
	return b.Bytes(), nil
}
