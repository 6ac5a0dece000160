#!/usr/bin/env bash
# Real container tools on a Debian machine without a registry: mmdebstrap, buildah, podman with runc, and Apptainer.
# Root; repeatable. Apptainer is in Debian's unstable release only, built against a newer libc: its two programs get a
# private copy of that libc, and the rest of the system stays as it is.
set -euo pipefail
libc=/opt/apptainer-libc
log=$(mktemp)
trap 'rc=$?; [ $rc = 0 ] || tail -5 "$log" >&2; rm -rf "$log" "${stage:-}"; exit $rc' EXIT
export DEBIAN_FRONTEND=noninteractive

command -v apt-get >/dev/null || { echo "not a Debian machine: there is no apt-get" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "only root can install packages" >&2; exit 1; }

missing=()
for package in mmdebstrap buildah podman runc squashfs-tools squashfuse uidmap patchelf libseccomp2 libsqlite3-0; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)" ] || apt-get update -q >"$log" 2>&1
    apt-get install -y -q --no-install-recommends "${missing[@]}" >"$log" 2>&1
fi

if ! apptainer version >/dev/null 2>&1; then
    stage=$(mktemp -d)
    mkdir -p "$stage"/{lists/partial,cache/archives/partial,debs,apptainer,libc} "$libc"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 -E '/debian/?$') ||
        { echo "Apptainer is taken from Debian's mirror, and apt knows none" >&2; exit 1; }
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keyring] $mirror sid main" >"$stage/sources.list"
    # A package state of its own, so that nothing else ever comes from the unstable release.
    unstable=(-o "Dir::Etc::sourcelist=$stage/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$stage/lists"
        -o "Dir::Cache=$stage/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root)
    apt-get "${unstable[@]}" update -q >"$log" 2>&1
    (cd "$stage/debs" && apt-get "${unstable[@]}" download apptainer libc6 >"$log" 2>&1)
    dpkg-deb -x "$stage"/debs/apptainer_*.deb "$stage/apptainer"
    dpkg-deb -x "$stage"/debs/libc6_*.deb "$stage/libc"
    cp -a "$stage"/libc/usr/lib/x86_64-linux-gnu/*.so* "$libc/"
    for program in usr/bin/apptainer usr/lib/x86_64-linux-gnu/apptainer/bin/starter; do
        patchelf --set-interpreter "$libc/ld-linux-x86-64.so.2" --force-rpath \
            --set-rpath "$libc:/lib/x86_64-linux-gnu" "$stage/apptainer/$program"
    done
    for folder in usr/bin usr/lib/x86_64-linux-gnu/apptainer etc/apptainer var/lib/apptainer; do
        mkdir -p "/$folder"
        cp -a "$stage/apptainer/$folder/." "/$folder/"
    done
    apptainer version >/dev/null
fi

# A virtual machine's root may lack a capability or two; Apptainer asks for all of them unless it is told which to take.
python3 - <<'PY'
import json, re
from pathlib import Path

names = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()
mask = int(re.search(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text()).group(1), 16)
held = [f"CAP_{name}" for bit, name in enumerate(names) if mask >> bit & 1]
if len(held) < len(names):
    Path("/etc/apptainer/capability.json").write_text(json.dumps({"users": {"root": held}}))
    settings = Path("/etc/apptainer/apptainer.conf")
    text = re.sub(r"(?m)^root default capabilities = \w+", "root default capabilities = file", settings.read_text())
    settings.write_text(text)
PY
for file in /etc/subuid /etc/subgid; do
    touch $file
    grep -q '^root:' $file || echo 'root:1000000:65536' >>$file
done
# Ordinary users mount an image through FUSE.
[ ! -e /dev/fuse ] || chmod 666 /dev/fuse
