#!/usr/bin/env escript
%% Copyright The nhybrid Authors.
%% SPDX-License-Identifier: Apache-2.0

main(_) ->
    {ok, _} = application:ensure_all_started(ssl),
    {ok, _} = application:ensure_all_started(inets),
    Sum = crypto:hash(sha256, <<"x">>),
    32 = byte_size(Sum),
    match = re:run("erlang", "^e.*g$", [{capture, none}]),
    io:format("hello from ~s~n", [string:lowercase("ERLANG")]).
