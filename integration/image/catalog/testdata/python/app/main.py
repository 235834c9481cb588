# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
import argparse
import http.server
import json
import logging
import os
import re
import sqlite3
import ssl
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from helper import NAME


def main():
    argparse.ArgumentParser().parse_args()
    logging.basicConfig(level=logging.INFO)
    with ThreadPoolExecutor(1) as pool:
        logging.info(pool.submit(json.dumps, {'name': NAME, 'at': datetime.now().isoformat()}).result())
    sqlite3.connect(':memory:').execute('select 1')
    ssl.create_default_context()
    print(re.sub('x', 'python', 'hello from x'))


if __name__ == '__main__':
    main()
