// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

'use strict';

const assert = require('assert');
const fs = require('fs');
const os = require('os');
const { Transform } = require('stream');
const util = require('util');

const upper = new Transform({
  transform(chunk, encoding, done) {
    done(null, chunk.toString().toLowerCase());
  },
});
upper.pipe(process.stdout);
assert(fs.existsSync(os.tmpdir()));
upper.end(util.format('HELLO FROM %s\n', 'IO.JS'));
