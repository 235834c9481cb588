# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

require 'set'

module Helper; end
