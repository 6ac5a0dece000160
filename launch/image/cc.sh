#!/bin/sh
# Stands for the C compiler that the image does not have, for the one module that Triton wants from it.
# Called as: cc SOURCE OPTIONS... -o OUTPUT ...
set -eu
ready=/opt/tsae/driver
if ! cmp -s "$1" $ready/driver.c; then
    echo "this image has no C compiler, and $1 is not the module that it has ready" >&2
    exit 1
fi
while [ "$1" != -o ]; do
    shift
done
cp $ready/cuda_utils.so "$2"
