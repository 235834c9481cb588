# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
"""What runs in the demo's container: something out of every layer of its image."""
import configparser
import glob
import platform
import ssl
import subprocess
import time


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


conf = configparser.ConfigParser()
with open("/etc/app.conf") as f:
    conf.read_string("[app]\n" + f.read())
print(conf["app"]["greeting"], flush=True)

release = platform.freedesktop_os_release()["PRETTY_NAME"]
print(f"{release}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}")
print("node " + output("node", "--version") + ", perl " + output("perl", "-e", "print $^V"))
print(f"{len(glob.glob('/usr/share/ca-certificates/mozilla/*.crt'))} certificates; it is {time.strftime('%H:%M %Z')} in Prague")

import numpy
import scipy
import scipy.linalg

a = scipy.linalg.hilbert(6)
error = abs(a @ scipy.linalg.inv(a) - numpy.eye(6)).max()
print(f"numpy {numpy.__version__}, scipy {scipy.__version__}: a 6x6 matrix inverted, largest error {error:.0e}")
