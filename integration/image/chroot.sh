# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
#
# chroot.sh LOWERS UPPER WORK ROOT DEBS COMMAND: run the command in a chroot of the layers. The caller gives it mount and
# process namespaces of its own, so that no mount and no daemon started by a package is left.
set -eu
lowers=$1 upper=$2 work=$3 root=$4 debs=$5 command=$6

# Without these features of overlayfs every change in the upper directory is a plain file, directory or whiteout.
mount -t overlay -o "lowerdir=$lowers,upperdir=$upper,workdir=$work,redirect_dir=off,metacopy=off,index=off" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for d in tmp run var/cache/apt var/lib/apt/lists; do
    mount -t tmpfs -o mode=1777 tmpfs "$root/$d"
done
mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
if [ -n "$debs" ]; then
    mkdir "$root/run/debs"
    mount --bind "$debs" "$root/run/debs"
fi
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
    DEBIAN_FRONTEND=noninteractive /bin/sh -euc "$command"
