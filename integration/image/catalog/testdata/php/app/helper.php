<?php
// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

function helper(): string
{
    return 'php';
}
