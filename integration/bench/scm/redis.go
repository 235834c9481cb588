// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
)

// redisTests are the requests of figure 7.
var redisTests = []string{"set", "get", "lpush"}

// server is a kind of Redis: where its heap lies, and whether it writes a log.
type server struct {
	name    string
	place   place
	preload bool // the heap is where the place says; else in ordinary memory, by Redis's own allocator
	log     bool // append-only file, each write synced
	why     string
}

const heapOnly = "the heap is placed, not kept: nothing survives the process"

var servers = []server{
	{name: "host", place: onHost, preload: true, why: heapOnly},
	{name: "container", place: inMapping, preload: true, why: heapOnly},
	{name: "volume", place: inVolume, preload: true, why: heapOnly},
	{name: "storage", place: inStorage, preload: true, why: heapOnly},
	{name: "dram preload", place: inDRAM, preload: true, why: heapOnly},
	{name: "dram", place: inDRAM, why: "Redis as it is, with jemalloc: nothing survives the process"},
	{name: "log on volume", place: inVolume, log: true, why: "Redis as it is; append-only file, fsync before each answer"},
	{name: "log in storage", place: inStorage, log: true, why: "Redis as it is; append-only file, fsync before each answer"},
}

// redis is a running server.
type redis struct {
	server
	cmd     *exec.Cmd
	ended   chan error // of the command
	out     bytes.Buffer
	socket  string
	cleanup func() error
}

// redisBench measures Redis with redis-benchmark, server by server in turns.
func (b *bench) redisBench(ctx context.Context) error {
	for round := range b.options.redisRounds {
		began := time.Now()
		if err := b.redisRound(ctx, round); err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
		b.say("round %d of %d: Redis, %d servers, %s", round+1, b.options.redisRounds, len(servers), time.Since(began).Round(100*time.Millisecond))
	}
	return nil
}

func (b *bench) redisRound(ctx context.Context, round int) (err error) {
	rnd := rand.New(rand.NewPCG(uint64(round), 2))
	inTurn := func() []server {
		return turns(servers, func(s server) string { return s.name }, rnd, [2]string{"container", "host"}, [2]string{"container", "dram"})
	}
	running := map[string]*redis{}
	defer func() {
		for _, r := range running {
			if serr := r.stop(); ctx.Err() == nil { // an interruption has ended them all
				err = errors.Join(err, serr)
			}
		}
	}()
	for i, s := range inTurn() {
		r, err := b.startRedis(ctx, s, fmt.Sprintf("r%d-%d", round, i))
		if err != nil {
			return err
		}
		running[s.name] = r
	}
	for range b.options.redisSlices {
		for _, r := range running {
			if err := r.ask("FLUSHALL", "+OK"); err != nil {
				return err
			}
		}
		for _, test := range redisTests {
			for _, s := range inTurn() {
				ns, err := b.redisTurn(ctx, running[s.name], test)
				if err != nil {
					return fmt.Errorf("redis, %s, %s: %w", s.name, test, err)
				}
				t := b.redis.get(test, s.name)
				if t == nil {
					durable := scmlib.Volatile.String()
					if s.log {
						if durable, err = b.stand.durability(s.place); err != nil {
							return err
						}
					}
					t = &series{Workload: test, Contender: s.name, Language: "C", Place: s.place, Durability: durable, Why: s.why, N: b.options.requests}
					b.redis = append(b.redis, t)
				}
				for len(t.NS) <= round {
					t.NS = append(t.NS, nil)
				}
				t.NS[round] = append(t.NS[round], ns)
			}
		}
	}
	return nil
}

func (b *bench) startRedis(ctx context.Context, s server, id string) (_ *redis, err error) {
	dir := filepath.Join(b.stand.dir, "s", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	r := &redis{server: s, socket: filepath.Join(dir, "sock")}
	at, library := "/sock/sock", "/bench/"+preload
	if s.place == onHost {
		at, library = r.socket, b.stand.program(preload)
	}
	var env []string
	if s.preload {
		env = append(env, "LD_PRELOAD="+library)
	}
	args := []string{redisServer, "--port", "0", "--unixsocket", at, "--save", "", "--hz", "1", "--server_cpulist", strconv.Itoa(b.options.cpu)}
	if s.log {
		args = append(args, "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0", "--dir", here+"/")
	}
	var mount []string
	if s.place != onHost {
		mount = []string{"--mount", "type=bind,src=" + dir + ",dst=/sock,options=rbind:rw"}
	}
	_, size := b.options.regionSizes()
	if r.cmd, r.cleanup, err = b.stand.command(ctx, start{s.place, id, size, env, mount, args}); err != nil {
		return nil, fmt.Errorf("start redis, %s: %w", s.name, err)
	}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if err := r.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start redis, %s: %w", s.name, err), r.cleanup())
	}
	r.ended = make(chan error, 1)
	go func() { r.ended <- r.cmd.Wait() }()
	for late := time.After(stopTimeout); ; {
		err := r.ask("PING", "+PONG")
		if err == nil {
			return r, nil
		}
		select {
		case end := <-r.ended:
			return nil, errors.Join(fmt.Errorf("start redis, %s: it ended: %w: %s", s.name, cmp.Or(end, err), bytes.TrimSpace(r.out.Bytes())), r.cleanup())
		case <-late:
			_ = r.cmd.Process.Kill()
			end := <-r.ended
			return nil, errors.Join(fmt.Errorf("start redis, %s: %w; %w: %s", s.name, err, end, bytes.TrimSpace(r.out.Bytes())), r.cleanup())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// ask sends one request and compares the answer.
func (r *redis) ask(request, want string) error {
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(stopTimeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "%s\r\n", request); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if got := strings.TrimSpace(line); err == nil && got != want {
		return fmt.Errorf("redis answers %q to %s", got, request)
	}
	return err
}

func (r *redis) stop() error {
	_ = r.ask("SHUTDOWN NOSAVE", "") // it goes without an answer
	late := time.AfterFunc(stopTimeout, func() { _ = r.cmd.Process.Kill() })
	defer late.Stop()
	if err := <-r.ended; err != nil {
		err = fmt.Errorf("stop redis, %s: %w: %s", r.name, err, bytes.TrimSpace(r.out.Bytes()))
		return errors.Join(err, r.cleanup())
	}
	return r.cleanup()
}

// redisTurn runs redis-benchmark once, beside the server's processor, and returns the nanoseconds a request.
func (b *bench) redisTurn(ctx context.Context, r *redis, test string) (float64, error) {
	o := b.options
	args := []string{
		"redis-benchmark", "-s", r.socket, "-t", test, "-n", strconv.Itoa(o.requests), "-c", strconv.Itoa(o.clients), "-r", "100000", "-d", "100", "--csv",
	}
	if others := otherCPUs(o.cpu, runtime.NumCPU()); others != "" {
		args = append([]string{"taskset", "-c", others}, args...)
	}
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil {
		return 0, fmt.Errorf("redis-benchmark: %w", err)
	}
	rate, err := requestRate(bytes.NewReader(out), test)
	if err != nil {
		return 0, err
	}
	return 1e9 / rate, nil
}

// otherCPUs lists all processors but one, for taskset(1); "" where there is no other.
func otherCPUs(cpu, n int) string {
	var s []string
	for i := range n {
		if i != cpu {
			s = append(s, strconv.Itoa(i))
		}
	}
	return strings.Join(s, ",")
}

// requestRate reads requests a second from the output of redis-benchmark --csv: a head with "rps" in it, and a line for the test.
func requestRate(r io.Reader, test string) (float64, error) {
	rows, err := csv.NewReader(r).ReadAll()
	if err != nil {
		return 0, fmt.Errorf("output of redis-benchmark: %w", err)
	}
	if len(rows) == 0 {
		return 0, errors.New("redis-benchmark has said nothing")
	}
	column := slices.Index(rows[0], "rps")
	for _, row := range rows[1:] {
		if column >= 0 && strings.EqualFold(row[0], test) {
			rate, err := strconv.ParseFloat(row[column], 64)
			if err != nil || rate <= 0 {
				return 0, fmt.Errorf("redis-benchmark: %q requests a second", row[column])
			}
			return rate, nil
		}
	}
	return 0, fmt.Errorf("output of redis-benchmark: no line for %q in %q", test, rows)
}
