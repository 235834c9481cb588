// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
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

// report is what the demo has seen, and out/demo.json. Sizes are bytes.
type report struct {
	Image  string  `json:"image"`
	Policy string  `json:"policy"`
	Layers []layer `json:"layers"`
	Stored int64   `json:"stored"` // in the files of all layers
	Pull   story   `json:"pull"`
	// NVM taken by the image when the pull was over, and when all was done that follows the first start.
	AfterPull  usage  `json:"nvm_after_pull"`
	AfterStart usage  `json:"nvm_after_start"`
	First      result `json:"first_start"`
	// Files that the start opened, their bytes, and how many of these it touched.
	Files   int64  `json:"files"`
	Opened  int64  `json:"opened"`
	Touched int64  `json:"touched"`
	Second  result `json:"second_start"`
}

type layer struct {
	Index  int32  `json:"index"`
	Digest string `json:"digest"`
	Bytes  int64  `json:"bytes"`  // of the blob, as downloaded
	Stored int64  `json:"stored"` // of the files in it
	// Pack is the size of its pack without holes, Early what it held when the link let through the last byte of the blob.
	Pack   int64  `json:"pack"`
	Early  int64  `json:"early"`
	Tier   string `json:"tier"`
	Reason string `json:"reason"`
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

// inspect waits until all layers are durable and asks the daemon what stands where.
func (rep *report) inspect(ctx context.Context, client control.Client, r *rig.Rig) error {
	answer, err := awaitImage(ctx, client, r, "durable", func(l *control.Layer) bool { return l.GetDurable() })
	if err != nil {
		return err
	}
	rep.Image = answer.GetImage()
	for _, l := range answer.GetLayers() {
		rep.Layers = append(rep.Layers, layer{
			Index: l.GetIndex(), Digest: l.GetDigest(), Bytes: l.GetCompressed(), Stored: l.GetUncompressed(),
			Pack: l.GetHddBytes(), Tier: l.GetTier(), Reason: l.GetDecision().Cause(),
		})
		rep.Stored += l.GetUncompressed()
	}
	return nil
}

// awaitImage waits until the condition holds for all layers of the image.
func awaitImage(ctx context.Context, client control.Client, r *rig.Rig, what string, is func(*control.Layer) bool) (answer *control.InspectResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = rig.Await(ctx, func(ctx context.Context) (err error) {
		answer, err = client.Inspect(ctx, &control.InspectRequest{Ref: r.Ref(imageName), Namespace: r.Namespace})
		if err != nil {
			return err
		}
		for _, l := range answer.GetLayers() {
			if !is(l) {
				return fmt.Errorf("layer %d is %s, not yet %s", l.GetIndex(), l.GetState(), what)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("wait for the layers of the image: %w", err)
	}
	return answer, nil
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

func (res result) print() {
	fmt.Printf("$ %s\n%s\n", quote(res.Command), strings.TrimRight(res.Output, "\n"))
}

func (rep *report) printTable(names []string) {
	say("What was stored when, and where (nhybridctl inspect)")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LAYER\tWHAT\tDIGEST\tDOWNLOADED\tPACK BY THEN\tPACK IN THE END\tTIER\tWHY")
	for i, l := range rep.Layers {
		what := ""
		if i < len(names) {
			what = names[i]
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Index, what, control.Short(l.Digest), placement.FormatBytes(l.Bytes),
			placement.FormatBytes(l.Early), placement.FormatBytes(l.Pack), strings.ToUpper(l.Tier), l.Reason)
	}
	_ = w.Flush()
}

// share writes bytes and what part of the image they are.
func (rep *report) share(n int64) string {
	return fmt.Sprintf("%s (%.0f %%)", placement.FormatBytes(n), 100*float64(n)/float64(max(1, rep.Stored)))
}

func (rep *report) printPull() {
	var early, pack, down int64
	for _, l := range rep.Layers {
		early += min(l.Early, l.Pack) // the last block may be filled
		pack += l.Pack
		down += l.Bytes
	}
	fmt.Printf("Downloaded: %s in %.2f s. When the last byte of each layer arrived, its pack had been written so far: %s of %s in all packs.\n",
		placement.FormatBytes(down), rep.Pull.DownloadedS, placement.FormatBytes(early), placement.FormatBytes(pack))
	fmt.Printf("After the last byte of the download: stored in %.2f s, durable in %.2f s.\n",
		rep.Pull.StoredS-rep.Pull.DownloadedS, rep.Pull.DurableS-rep.Pull.DownloadedS)
	fmt.Printf("On NVM: %s of %s; %s of that are the view, which holds names and attributes.\n",
		rep.share(rep.AfterPull.all()), placement.FormatBytes(rep.Stored), placement.FormatBytes(rep.AfterPull.Views))
}

func (rep *report) printStarts() {
	fmt.Printf("Its first output came %d ms after `ctr run` began; that of the first start after %d ms.\n", rep.Second.ReadyMS, rep.First.ReadyMS)
	say("On NVM in the end: %s of %s", rep.share(rep.AfterStart.all()), placement.FormatBytes(rep.Stored))
	fmt.Printf("The start opened %d files of %s and touched %s of them. NVM holds %s of whole files, %s of the parts of large ones and what is next to them, and the view of %s.\n",
		rep.Files, rep.share(rep.Opened), rep.share(rep.Touched), placement.FormatBytes(rep.AfterStart.Files), placement.FormatBytes(rep.AfterStart.Parts), placement.FormatBytes(rep.AfterStart.Views))
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
