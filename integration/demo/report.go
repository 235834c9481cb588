// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// report is what the demo has seen, and out/demo.json.
type report struct {
	Image  string  `json:"image"`
	Policy string  `json:"policy"`
	LDL    int32   `json:"ldl"` // -1: nothing was downloaded
	Layers []layer `json:"layers"`
	// Boundary says if the layers below the LDL are on HDD, and it and those above on NVM.
	Boundary    bool    `json:"boundary"`
	Events      []event `json:"events"`
	PullSeconds float64 `json:"pull_seconds"`
	Run         result  `json:"run"`
	Heat        heat    `json:"heat"`
}

type layer struct {
	Index  int32  `json:"index"`
	Digest string `json:"digest"`
	Bytes  int64  `json:"bytes"`  // of the blob, as downloaded
	Stored int64  `json:"stored"` // of the files in it
	Tier   string `json:"tier"`
	Reason string `json:"reason"`
	Swings int32  `json:"swings"`

	nvm int64
}

// event is a line of the daemon's log about the place of a layer.
type event struct {
	Time   time.Time `json:"time"`
	Msg    string    `json:"msg"`
	Layer  int       `json:"layer"`
	Tier   string    `json:"tier"`
	Reason string    `json:"reason"`
	Image  string    `json:"-"`
}

type result struct {
	Command []string `json:"command"`
	Exit    int      `json:"exit"`
	Output  string   `json:"output"`
	ReadyMS int64    `json:"ready_ms"` // from the start of `ctr run` to the first output of the container
}

// introduce tells what the daemon has found.
func introduce(s *control.StatusResponse) {
	for _, t := range s.GetTiers() {
		fmt.Printf("%s: %s on %s, %s free\n", strings.ToUpper(t.GetName()), t.GetFilesystem(), t.GetDevice(), placement.FormatBytes(t.GetFree()))
	}
	fmt.Printf("Policy %s, kernel %s, containerd %s\n", s.GetPolicy(), s.GetKernel().GetRelease(), s.GetContainerd().GetVersion())
	for _, w := range s.GetWarnings() {
		fmt.Println("Warning:", w)
	}
}

// inspect asks the daemon what stands where. Sizes are known once the captures are done, in the background.
func (rep *report) inspect(ctx context.Context, client control.Client, r *rig.Rig) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var answer *control.InspectResponse
	err := rig.Await(ctx, func(ctx context.Context) (err error) {
		answer, err = client.Inspect(ctx, &control.InspectRequest{Ref: r.Ref(imageName), Namespace: r.Namespace})
		if err != nil {
			return err
		}
		for _, l := range answer.GetLayers() {
			if !l.GetCaptured() {
				return fmt.Errorf("layer %d is not captured yet", l.GetIndex())
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("inspect the image: %w", err)
	}
	rep.take(answer)
	return nil
}

func (rep *report) take(answer *control.InspectResponse) {
	rep.Image, rep.LDL, rep.Layers = answer.GetImage(), -1, nil
	for _, l := range answer.GetLayers() {
		if l.GetLdl() {
			rep.LDL = l.GetIndex()
		}
		rep.Layers = append(rep.Layers, layer{
			Index: l.GetIndex(), Digest: l.GetDigest(), Bytes: l.GetCompressed(), Stored: l.GetUncompressed(),
			Tier: l.GetTier(), Reason: l.GetDecision().Cause(), Swings: l.GetDecision().GetSwings(),
			nvm: l.GetNvmBytes(),
		})
	}
	rep.Boundary = rep.LDL >= 0
	for _, l := range rep.Layers {
		rep.Boundary = rep.Boundary && (l.Tier == placement.NVM.String()) == (l.Index >= rep.LDL)
	}
}

// placements reads the lines about the layers of an image from the daemon's log.
func placements(path, image string) ([]event, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read log of the daemon: %w", err)
	}
	defer f.Close()
	var out []event
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct {
			event
			Image string `json:"image"`
		}
		if json.Unmarshal(lines.Bytes(), &line) != nil || !strings.HasPrefix(line.Msg, "layer ") || line.Image != image {
			continue // another line, or what a crash wrote
		}
		out = append(out, line.event)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read log of the daemon: %w", err)
	}
	return out, nil
}

// printEvents shows what the log has of the layers whose place was changed after containerd had got it: a place is
// observed, not guessed.
func (rep *report) printEvents() {
	say("Swings in the daemon's log: changes of a layer's tier between Prepare and the start of its storing")
	swung := map[int]bool{}
	for _, e := range rep.Events {
		swung[e.Layer] = swung[e.Layer] || e.Msg == "layer swung"
	}
	shown := false
	for _, e := range rep.Events {
		if swung[e.Layer] {
			shown = true
			fmt.Printf("%6.2f s  layer %d %-8s %s  %s\n", e.Time.Sub(rep.Events[0].Time).Seconds(), e.Layer,
				strings.TrimPrefix(e.Msg, "layer "), strings.ToUpper(e.Tier), cause(e))
		}
	}
	if !shown {
		fmt.Println("None: what was so at Prepare was still so when storing began.")
	}
}

func cause(e event) string {
	return (&control.Decision{Index: int32(e.Layer), Tier: e.Tier, Reason: e.Reason}).Cause()
}

// runContainer runs the command and times its first output.
func runContainer(ctx context.Context, r *rig.Rig, command []string) (res result, err error) {
	cmd, err := r.Command(ctx, "ctr", append([]string{"run", "--rm", r.Ref(imageName), "demo"}, command...)...)
	if err != nil {
		return res, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return res, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return res, fmt.Errorf("run container: %w", err)
	}
	var output bytes.Buffer
	b := make([]byte, 4096)
	for {
		n, err := stdout.Read(b)
		if n > 0 && output.Len() == 0 {
			res.ReadyMS = time.Since(began).Milliseconds()
		}
		output.Write(b[:n])
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return res, errors.Join(fmt.Errorf("read output of container: %w", err), cmd.Wait())
		}
	}
	err = cmd.Wait()
	res.Command, res.Exit, res.Output = command, cmd.ProcessState.ExitCode(), output.String()
	if err != nil {
		return res, fmt.Errorf("run container: %w: %s", err, strings.TrimSpace(output.String()+stderr.String()))
	}
	return res, nil
}

func (rep *report) printRun() {
	fmt.Printf("$ %s\n%s\nIts first output came %d ms after `ctr run` began.\n",
		quote(rep.Run.Command), strings.TrimRight(rep.Run.Output, "\n"), rep.Run.ReadyMS)
}

func (rep *report) printTable(names []string) {
	say("What stands where, and why (nhybridctl inspect)")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LAYER\tWHAT\tDIGEST\tDOWNLOADED\tSTORED\tTIER\tWHY")
	var nvm, all int64
	for i, l := range rep.Layers {
		what := ""
		if i < len(names) {
			what = names[i]
		}
		mark := ""
		if l.Index == rep.LDL {
			mark = "*"
		}
		fmt.Fprintf(w, "%d%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Index, mark, what, control.Short(l.Digest),
			placement.FormatBytes(l.Bytes), placement.FormatBytes(l.Stored), strings.ToUpper(l.Tier), l.Reason)
		all += l.Stored
		if l.Tier == placement.NVM.String() {
			nvm += l.Stored
		}
	}
	_ = w.Flush()
	if all > 0 {
		fmt.Printf("On NVM: %s of %s (%.0f %%).\n", placement.FormatBytes(nvm), placement.FormatBytes(all), 100*float64(nvm)/float64(all))
	}
	fmt.Println(rep.verdict())
}

// verdict compares what happened with what the paper's strategy gives when layers are unpacked one after the other.
func (rep *report) verdict() string {
	switch {
	case rep.LDL < 0:
		return "Nothing was downloaded, so no layer was the last."
	case rep.Boundary:
		return fmt.Sprintf("* Layer %d was downloaded last: the layers below it are on HDD, it and those above on NVM.", rep.LDL)
	}
	var odd []string
	for _, l := range rep.Layers {
		if (l.Tier == placement.NVM.String()) != (l.Index >= rep.LDL) {
			odd = append(odd, fmt.Sprintf("%d on %s", l.Index, strings.ToUpper(l.Tier)))
		}
	}
	return fmt.Sprintf("* Layer %d was downloaded last, but the boundary is not there: layer %s. The reasons stand above.", rep.LDL, strings.Join(odd, ", "))
}

func (rep *report) write(file string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(rep); err != nil {
		return err
	}
	// By rename, so that who waits for the file never reads half of it.
	if err := os.WriteFile(file+".new", b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return os.Rename(file+".new", file)
}
