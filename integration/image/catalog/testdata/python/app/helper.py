# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
import csv
import uuid

NAME = 'helper'
