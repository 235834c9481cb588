// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package wire is what the benchmark and its workers say to each other: a worker first writes one Hello, then answers each Request
// with one Reply, all of them JSON, one a line. Workers are written in Go and in C.
package wire

// Hello is what a worker has found where it stands.
type Hello struct {
	// Granularity, Durability and Why are the library's own word about the mapping; or, where there is no such library, what can be said.
	Granularity string `json:"granularity"`
	Durability  string `json:"durability"`
	Why         string `json:"why"`
	Mount       string `json:"mount,omitempty"`
	// Instruction that writes cache lines back.
	Instruction string `json:"instruction,omitempty"`
	Error       string `json:"error,omitempty"`
}

// Request asks for n operations of a workload, after a warm-up of Warm that is not timed. The first request for a workload also makes what it works on.
type Request struct {
	Op   string `json:"op"`
	N    int    `json:"n"`
	Warm int    `json:"warm"`
}

// Reply is how long the operations took, all together.
type Reply struct {
	NS    int64  `json:"ns"`
	Error string `json:"error,omitempty"`
}
