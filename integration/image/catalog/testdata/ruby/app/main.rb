# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

require 'erb'
require 'json'
require 'logger'
require 'net/http'
require 'openssl'
require 'optparse'
require 'time'
require 'yaml'
require_relative 'helper'

Logger.new($stdout).info(JSON.generate('at' => Time.now.iso8601))
puts ERB.new('hello from <%= YAML.load("ruby") %>').result
