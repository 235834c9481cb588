// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// oneLine has the error of a call reach containerd as its code and one line. Else each class that is wrapped in
// the error travels as a detail too, and containerd's client shows each on a line of its own.
func oneLine(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	return status.Error(st.Code(), strings.Join(strings.FieldsFunc(st.Message(), func(r rune) bool { return r == '\n' }), "; "))
}

func oneLineUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	answer, err := handle(ctx, req)
	return answer, oneLine(err)
}

func oneLineStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	return oneLine(handle(srv, stream))
}
