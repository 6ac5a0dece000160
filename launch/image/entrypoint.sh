#!/bin/sh
# What the image runs: the quickstart sweep; a script of launch/ ("launch/sweep.py ..."); a program of the image (python,
# torchrun, sh, a path); else a command of `tsae`.
set -eu

home=${TSAE_HOME:-runs}
folder=$home
until [ -d "$folder" ]; do
    folder=$(dirname "$folder")
done

# Docker starts this as root. The work is done as the owner of the mounted folder, so that its files are the user's own.
# Apptainer, `--user` and rootless engines are that user already.
read -r _ host_user _ </proc/self/uid_map
if [ "$(id -u)" = 0 ] && [ "$host_user" = 0 ] && [ -z "${APPTAINER_CONTAINER:-}" ]; then
    owner=$(stat -c %u:%g "$folder")
    if [ "$owner" = 0:0 ] && [ -z "$(ls -A "$folder")" ]; then
        # Docker has just made the folder, because it was missing.
        owner=1000:1000
        chown $owner "$folder" || echo "mount a folder of your own at $folder, or give --user" >&2
    fi
    if [ "$owner" != 0:0 ]; then
        exec setpriv --reuid="${owner%:*}" --regid="${owner#*:}" --clear-groups -- "$0" "$@"
    fi
fi

# Docker's --read-only leaves no place for temporary files.
if [ -z "${TMPDIR:-}" ] && [ ! -w /tmp ] && mkdir -p "$home/.tmp"; then
    export TMPDIR="$home/.tmp"
fi

case ${1:-sweep} in
sweep | launch/sweep.py | harvest | train | evaluate)
    if [ "$(df --output=target "$folder" | tail -1)" = / ]; then
        echo "no folder is mounted at $home: nothing that is written there outlasts this container" >&2
    fi
    ;;
esac

if [ $# = 0 ]; then
    set -- sweep split_fraction
fi
case $1 in
launch/*.py)
    script=/opt/tsae/$1
    shift
    exec python "$script" "$@"
    ;;
tsae | python | python3 | torchrun | accelerate | sh | bash | /*) exec "$@" ;;
*) exec tsae "$@" ;;
esac
