// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

'use strict';

const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const https = require('https');
const path = require('path');
const zlib = require('zlib');

const { name } = JSON.parse(fs.readFileSync(path.join(__dirname, 'package.json')));
const id = crypto.createHash('sha256').update(name).digest('hex');

http.createServer((request, response) => {
  response.setHeader('content-type', 'text/plain');
  response.setHeader('x-packed', zlib.gzipSync(id).length);
  response.end(`hello from node, ${https.globalAgent.protocol}\n`);
}).listen(3000);
