#!/usr/bin/perl
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

use strict;
use warnings;

use Digest::SHA qw(sha256_hex);
use File::Temp qw(tempfile);
use Getopt::Long;
use HTTP::Tiny;
use IO::Socket::INET;
use JSON::PP;
use POSIX qw(strftime);
use Time::HiRes qw(time);

GetOptions('verbose' => \my $verbose) or exit 2;
my ($file) = tempfile(UNLINK => 1);
print {$file} encode_json({ at => strftime('%F', gmtime(time)), sum => sha256_hex('x') });
print "hello from perl\n";
