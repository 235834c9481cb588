// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region"
)

const (
	ledgerLayout = "pmem-ledger"
	// volumeOfC is the ledger's in C, which outlives its container; that in Go has a region of its container.
	volumeOfC = "ledger-volume"
	// plain is a volume whose content is not scmlib's.
	plain      = "plain"
	plainWords = "kept by whoever wrote it"
)

// ledgerContainer is the container in which a ledger works until the power goes.
func ledgerContainer(language string) container { return container{"ledger-" + language} }

func ledgerRegion(language string) string {
	if language == "c" {
		return volumeOfC
	}
	return "container/ledger-go"
}

func ledgerLog(language string) string { return filepath.Join(logDir, "ledger-"+language) }

// promisePort is the device by which a ledger speaks to the world outside of the machine.
func promisePort(language string) (string, error) {
	ports, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", err
	}
	for _, port := range ports {
		if name, err := os.ReadFile(port); err == nil && strings.TrimSpace(string(name)) == "promises."+language {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(port))), nil
		}
	}
	return "", fmt.Errorf("find the port of the ledger in %s: %w", language, errNone)
}

// makeVolumes makes the volumes and writes into the one that is not scmlib's.
func makeVolumes(ctx context.Context) error {
	for name, size := range map[string]string{volumeOfC: "8m", plain: "1m"} {
		if _, err := output(ctx, "nhybridctl", "scm", "create", name, "--size", size); err != nil {
			return err
		}
	}
	script := fmt.Sprintf("echo %s | dd of=/dev/scm/region conv=notrunc,fsync", plainWords)
	_, err := output(ctx, "nhybridctl", "scm", "attach", plain, "--", "busybox", "sh", "-c", script)
	return err
}

// startLedgers makes the containers of the ledgers, starts them and waits until they work.
func (g *guest) startLedgers(ctx context.Context) error {
	for _, language := range languages {
		device := "nhybrid.io/scm=16m"
		if language == "c" {
			device = "nhybrid.io/scm=" + volumeOfC
		}
		port, err := promisePort(language)
		if err != nil {
			return err
		}
		name := ledgerContainer(language).id
		if _, err := ctr(ctx, "containers", "create", "--snapshotter", g.snapshotter, "--device", device, "--device", port, g.image(), name, "/bin/"+name, "work", port); err != nil {
			return err
		}
	}
	// Nobody syncs the writable directories of a new container, and without them it cannot be started after a power cut. Its region comes after
	// this, and has to see to itself.
	unix.Sync()
	return errors.Join(g.startLedgersAgain(ctx), g.ledgersWork(ctx))
}

// startLedgersAgain starts the ledgers in containers that are there, as those that a power cut has ended.
func (g *guest) startLedgersAgain(ctx context.Context) error {
	for _, language := range languages {
		if _, err := ctr(ctx, "tasks", "start", "--detach", "--log-uri", "file://"+ledgerLog(language), ledgerContainer(language).id); err != nil {
			return err
		}
	}
	return nil
}

// ledgersWork waits until each ledger has opened its region, found all of it in order, and begun to work; and compares with what was promised.
func (g *guest) ledgersWork(ctx context.Context) error {
	for _, language := range languages {
		f, err := waitForLedger(ctx, language)
		if err == nil {
			err = g.compareLedger(language, f)
		}
		if err != nil {
			return fmt.Errorf("ledger in %s: %w", language, err)
		}
	}
	return nil
}

func waitForLedger(ctx context.Context, language string) (f facts, err error) {
	var failed error
	err = poll(ctx, func() error {
		data, err := os.ReadFile(ledgerLog(language))
		if err != nil {
			return err
		}
		f = readFacts(string(data))
		if why, ok := f["failed:"]; ok {
			failed = errors.New(why)
			return nil
		}
		if _, ok := f["working"]; !ok {
			return fmt.Errorf("it does not work yet, and has said %q", data)
		}
		return nil
	})
	return f, errors.Join(err, failed)
}

// compareLedger shows that nothing promised is missing. That nothing is there by half the ledger itself has looked at.
func (g *guest) compareLedger(language string, f facts) error {
	granularity, _ := g.granularity()
	if err := f.want("granularity", granularity, "durability", "power loss", "mapsync", "1"); err != nil {
		return err
	}
	count, err := strconv.ParseUint(f["count"], 10, 64)
	if err != nil {
		return fmt.Errorf("its count: %w", err)
	}
	if count < g.said[language] {
		return fmt.Errorf("%d transactions are there, and %d had been promised", count, g.said[language])
	}
	if g.boot != "first" {
		g.say("note ledger in %s: %d transactions were promised, %d are there, %s rolled back", language, g.said[language], count, f["recovered"])
	}
	return nil
}

// scmList shows that all regions and no others are there after a power cut, before anybody has opened them.
func scmList(ctx context.Context) error {
	return wantRegions(ctx, ledgerRegion("go"), volumeOfC, plain)
}

func wantRegions(ctx context.Context, want ...string) error {
	out, err := output(ctx, "nhybridctl", "--json", "scm", "ls")
	if err != nil {
		return err
	}
	var list region.Listing
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return fmt.Errorf("read the list of regions %q: %w", out, err)
	}
	if len(list.Broken) > 0 {
		return fmt.Errorf("regions are broken: %v", list.Broken)
	}
	found := []string{}
	for _, r := range list.Regions {
		found = append(found, r.String())
		if len(r.Users) > 0 {
			return fmt.Errorf("region %s is in use by %v, whom the power cut has ended", r.String(), r.Users)
		}
	}
	slices.Sort(found)
	slices.Sort(want)
	if !slices.Equal(found, want) {
		return fmt.Errorf("there are the regions %v, want %v", found, want)
	}
	return nil
}

// scmCheck examines all regions as the power cut has left them.
func (g *guest) scmCheck(ctx context.Context) error {
	for _, ref := range []string{ledgerRegion("go"), volumeOfC, plain} {
		out, err := output(ctx, "nhybridctl", "--json", "scm", "check", ref)
		if err != nil {
			return err
		}
		var r region.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return fmt.Errorf("read the report %q: %w", out, err)
		}
		if len(r.Problems) > 0 || r.Formatted != (ref != plain) || ref != plain && r.Layout != ledgerLayout {
			return fmt.Errorf("the report on %s: %s", ref, out)
		}
		if ref != plain && r.Pending > 0 {
			g.say("note region %s was cut off within a transaction", ref)
		}
	}
	out, err := output(ctx, "nhybridctl", "scm", "attach", plain, "--", "busybox", "head", "-n", "1", "/dev/scm/region")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(out); got != plainWords {
		return fmt.Errorf("the volume %s holds %q, want %q", plain, got, plainWords)
	}
	return nil
}

// otherLanguage lets Go recover and examine what C has left.
func (g *guest) otherLanguage(ctx context.Context) error {
	out, err := output(ctx, "nhybridctl", "scm", "attach", volumeOfC, "--", "ledger-go", "verify")
	if err != nil {
		return err
	}
	return g.compareLedger("c", readFacts(out))
}

// removeLedgers ends the ledgers. The region of a container goes with it, volumes when they are removed.
func removeLedgers(ctx context.Context) error {
	for _, language := range languages {
		if err := ledgerContainer(language).remove(ctx); err != nil {
			return err
		}
	}
	if err := poll(ctx, func() error { return wantRegions(ctx, volumeOfC, plain) }); err != nil {
		return err
	}
	if _, err := output(ctx, "nhybridctl", "scm", "rm", volumeOfC, plain); err != nil {
		return err
	}
	return wantRegions(ctx)
}
