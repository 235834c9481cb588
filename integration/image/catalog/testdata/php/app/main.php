<?php
// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

require_once __DIR__ . '/helper.php';

$document = new DOMDocument();
$document->loadXML('<hello>from</hello>');
$word = preg_replace('/x/', mb_strtolower('FROM'), 'x');
echo json_encode(['at' => date('c'), 'root' => $document->documentElement->nodeName]), "\n";
echo "hello $word ", helper(), "\n";
