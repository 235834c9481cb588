// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/rig"
)

func (o *options) run(ctx context.Context, progress io.Writer) (err error) {
	b := &bench{options: o, progress: progress, begun: time.Now(), links: map[key]lab.LinkRate{}, sizes: sizes{HDD: 8 << 30, NVM: 3 << 30}}
	if o.size == small {
		b.sizes = sizes{HDD: 1 << 30, NVM: 512 << 20}
	}
	if b.dir, err = lab.Scratch(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.Remove(b.dir)) }()
	found, err := lab.FindPrograms(o.bin)
	if err != nil {
		return err
	}
	b.bin = filepath.Join(b.dir, "bin")
	if err := lab.CopyPrograms(found, b.bin); err != nil {
		return err
	}
	chosen, err := chosenVariants(o.variants)
	if err != nil {
		return err
	}
	if err := checkIgzip(chosen); err != nil {
		return err
	}
	names, err := lab.Choose("image", o.images, imageNames)
	if err != nil {
		return err
	}
	if err := b.makeImages(ctx, names); err != nil {
		return err
	}
	if b.settings, err = b.fingerprints(); err != nil {
		return err
	}
	policy, err := b.defaultPolicy(ctx)
	if err != nil {
		return err
	}
	r := &result.Result{
		Name: "deploy", Command: lab.ShellCommand(), Machine: result.ThisMachine(), Targets: targets,
		Settings: map[string]any{
			"hdd": hddsim.HDD(), "devices": b.sizes, "drop_caches": o.dropCaches, "idle": o.idle.String(), "rounds": o.rounds,
			"images": b.layers, "setting": b.settings, "default_policy": policy,
		},
	}
	if r.Versions, err = result.Versions(ctx, found, "containerd", "ctr", "containerd-nhybrid-grpc"); err != nil {
		return err
	}
	raw := rawRuns{}
	if !slices.Contains(o.skip, partPull) {
		if raw.Pulls, err = b.pulls(ctx, plan(o.rounds, names, o.links, chosen)); err != nil {
			return err
		}
	}
	if !slices.Contains(o.skip, partPrepare) {
		if raw.Preparations, err = b.prepare(ctx, names[len(names)/2]); err != nil {
			return err
		}
	}
	if !slices.Contains(o.skip, partMetadata) {
		if raw.Captures, err = b.measureCaptures(ctx); err != nil {
			return err
		}
	}
	if !slices.Contains(o.skip, partHot) {
		if raw.Hot, err = b.measureHot(ctx, names[len(names)/2]); err != nil {
			return err
		}
	}
	r.Machine.LoadAfter = result.Load()
	if err := raw.fill(r, policy); err != nil {
		return err
	}
	path, err := r.Write(o.out)
	if err != nil {
		return err
	}
	b.say("wrote %s", path)
	return nil
}

// defaultPolicy is the one of a daemon that was told nothing.
func (b *bench) defaultPolicy(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "nhybridctl"), "config", "default").Output()
	if err != nil {
		return "", fmt.Errorf("ask for the default configuration: %w", err)
	}
	var config struct {
		Placement struct {
			Policy string `toml:"policy"`
		} `toml:"placement"`
	}
	if err := toml.Unmarshal(out, &config); err != nil {
		return "", fmt.Errorf("read the default configuration: %w", err)
	}
	return config.Placement.Policy, nil
}

// rawRuns is everything that the figures are made of.
type rawRuns struct {
	Pulls        runs                    `json:"pulls,omitempty"`
	Preparations map[string]*preparation `json:"preparations,omitempty"`
	Captures     []capture               `json:"captures,omitempty"`
	Hot          []hotRun                `json:"hot,omitempty"`
}

// fill derives figures and tables.
func (raw rawRuns) fill(r *result.Result, policy string) error {
	r.Runs = raw
	raw.Pulls.figures(r.Set)
	predictions, err := raw.Pulls.predicted(policy)
	if err != nil {
		return err
	}
	predictionFigures(predictions, r.Set)
	prepareFigures(raw.Preparations, r.Set)
	captureFigures(raw.Captures, r.Set)
	hotFigures(raw.Hot, r.Set)
	if len(raw.Pulls) == 0 {
		return nil
	}
	simulated, err := raw.Pulls.simulated(policy)
	if err != nil {
		return err
	}
	r.Tables = append(r.Tables, raw.Pulls.times("Seconds until the pull returned: median (range)", returned),
		raw.Pulls.times("Seconds until all was durable: median (range)", durable), raw.Pulls.costs(), raw.Pulls.placed(), predictionTable(predictions), simulated, raw.Pulls.copied())
	return nil
}

// pulls does what is left of the plan and returns all runs of it.
func (b *bench) pulls(ctx context.Context, keys []key) (done runs, err error) {
	log, earlier, err := result.OpenLog[run](filepath.Join(b.options.out, "deploy-raw.jsonl"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	have := map[key]run{}
	for _, r := range earlier {
		if r.Setting != "" && r.Setting == b.settings[r.Image] && !b.options.fresh {
			have[r.key] = r
		}
	}
	for i, k := range keys {
		r, ok := have[k]
		if !ok {
			if r, err = b.once(ctx, k); err != nil {
				return nil, fmt.Errorf("%s: %w", k, err)
			}
			if err := log.Append(r); err != nil {
				return nil, err
			}
			b.say("%d/%d %s: returned %.2f s, durable %.2f s, NVM %.1f of %.1f MB, LDL %d", i+1, len(keys), k,
				r.ReturnS, r.durable(), float64(r.NVMDataBytes)/1e6, float64(r.DataBytes)/1e6, r.LDL)
		}
		done = append(done, r)
	}
	return done, nil
}

// form is the version of what a run holds. Runs of another form are measured again.
const form = 4

// fingerprints are equal for runs of an image that may be compared: the same programs, layers and devices. Each image has
// its own, so that measurements of some images and of others add up.
func (b *bench) fingerprints() (map[string]string, error) {
	programs := sha256.New()
	for _, p := range []string{"containerd", "ctr", "containerd-nhybrid-grpc"} {
		f, err := os.Open(filepath.Join(b.bin, p))
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(programs, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	all := map[string]string{}
	for image, layers := range b.layers {
		h := sha256.New()
		if err := json.NewEncoder(h).Encode([]any{form, programs.Sum(nil), layers, b.sizes, hddsim.HDD(), b.options.dropCaches}); err != nil {
			return nil, err
		}
		all[image] = hex.EncodeToString(h.Sum(nil))[:16]
	}
	return all, nil
}
