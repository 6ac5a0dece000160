#!/bin/sh
# What the image runs: the quickstart sweep; a script of launch/ ("sweep ...", "launch/sweep.py ..."); a program of the
# image (python, torchrun, sh, a path); else a command of `tsae`.
set -eu

# Docker starts this as root. The work is done as the owner of the mounted folder, so that its files are the user's own.
# Apptainer, `--user` and rootless engines are that user already.
read -r _ host_user _ </proc/self/uid_map
if [ "$(id -u)" = 0 ] && [ "$host_user" = 0 ] && [ -z "${APPTAINER_CONTAINER:-}" ]; then
    owner=$(stat -c %u:%g "$TSAE_HOME")
    if [ "$owner" = 0:0 ] && [ -z "$(ls -A "$TSAE_HOME")" ]; then
        # Docker has just made the folder, because it was missing.
        owner=1000:1000
        chown $owner "$TSAE_HOME" || echo "mount a folder of your own at $TSAE_HOME, or give --user" >&2
    fi
    if [ "$owner" != 0:0 ]; then
        exec setpriv --reuid="${owner%:*}" --regid="${owner#*:}" --clear-groups -- "$0" "$@"
    fi
fi

if [ $# = 0 ]; then
    set -- sweep /opt/tsae/sweeps/split_fraction.yaml
fi
case $1 in
sweep | status | report)
    script=/opt/tsae/launch/$1.py
    shift
    exec python "$script" "$@"
    ;;
launch/*.py)
    script=/opt/tsae/$1
    shift
    exec python "$script" "$@"
    ;;
tsae | python | python3 | torchrun | accelerate | sh | bash | /*) exec "$@" ;;
*) exec tsae "$@" ;;
esac
