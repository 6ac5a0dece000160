#!/usr/bin/env bash
# make_base.sh FOLDER PYTHON: what python:3.11-slim is, without a registry: a minimal Debian as root file system,
# with the interpreter behind PYTHON at /usr/local, so that inside and outside differ in nothing but the container.
# pip inside takes wheels from /wheels alone.
set -euo pipefail
folder=$1 python=$2
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 -E '/debian/?$')
packages=ca-certificates,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g
[ "$prefix" != /usr ] || packages=ca-certificates,python3,python3-venv

mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$release" "$folder" "$mirror"
if [ "$prefix" != /usr ]; then
    library=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    mkdir -p "$folder/usr/local/lib"
    mkdir -p "$folder/usr/local/include"
    cp -a "$prefix/include/$library" "$folder/usr/local/include/"
    cp -a "$prefix/bin/$library" "$folder/usr/local/bin/"
    ln -s "$library" "$folder/usr/local/bin/python3"
    find "$prefix/lib" -maxdepth 1 -name 'libpython*.so*' -exec cp -a -t "$folder/usr/local/lib" {} +
    tar -C "$prefix/lib" --exclude="$library/site-packages/*" --exclude="$library/test" --exclude="$library/config-*" \
        -c "$library" | tar -C "$folder/usr/local/lib" -x
    chroot "$folder" ldconfig
fi
mkdir "$folder/wheels"
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$folder/etc/pip.conf"
# Unpacking device nodes takes privileges that an unprivileged build does not have; they are mounted at run time.
find "$folder/dev" -mindepth 1 -delete
