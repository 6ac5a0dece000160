#!/bin/sh
# install.sh torch|dependencies|driver|package: one layer of the image's environment, the slowest to change first.
# The pip that installs lies outside of the environment and stays out of the image. Packages come as wheels only.
set -eu
here=/opt/tsae
modules=$(echo /opt/venv/lib/python3*/site-packages)

pip_install() {
    /opt/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --no-compile --only-binary :all: --constraint $here/constraints.txt "$@"
}

# The tests of other packages, and what only a compiler or linker reads, are a quarter of an environment. What is left
# is compiled to bytecode, which a read-only image could not keep; templates that are no Python of their own are not.
finish() {
    find $modules -path '*.dist-info' -prune -o \
        \( -type d \( -name test -o -name tests \) -o -path '*/torch/include' -o -path '*/pyarrow/include' \
        -o -path '*/torch/bin/*[Tt]est*' -o -path '*/torch/bin/protoc*' -o -name '*.a' \) -prune -exec rm -rf {} +
    /opt/venv/bin/python -m compileall -q -j 0 $modules $here/launch >/dev/null || true
}

case $1 in
torch)
    python3 -m venv --without-pip /opt/venv
    modules=$(echo /opt/venv/lib/python3*/site-packages)
    version=$(sed -n 's/^torch==//p' $here/constraints.txt)
    case $TORCH in
    cuda) pip_install "torch==$version" ;;
    cpu) pip_install ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} "torch==$version+cpu" ;;
    *) echo "TORCH=$TORCH: cuda or cpu is expected" >&2 && exit 2 ;;
    esac
    finish
    ;;
dependencies)
    /opt/venv/bin/python - >/tmp/dependencies.txt <<'PY'
import tomllib

with open("/opt/tsae/pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
PY
    pip_install --requirement /tmp/dependencies.txt
    rm /tmp/dependencies.txt
    finish
    ;;
driver)
    # Triton has one C module compiled when it first meets a GPU. Made here, it lets the image do without a compiler:
    # cc.sh hands it over.
    mkdir -p $here/driver
    [ "$TORCH" = cuda ] || exit 0
    headers=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    needed="gcc libc6-dev"
    [ -e "$headers/Python.h" ] || needed="$needed libpython3-dev"
    apt-get update -q
    apt-get install -q -y --no-install-recommends $needed
    trap 'apt-get purge -q -y --auto-remove $needed; rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin' EXIT
    nvidia=$modules/triton/backends/nvidia
    stub=$(mktemp -d)
    gcc -x c -shared -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1" /dev/null
    gcc "$nvidia/driver.c" -O3 -shared -fPIC -Wno-psabi -I"$nvidia/include" -I"$headers" -L"$stub" -l:libcuda.so.1 \
        -o $here/driver/cuda_utils.so
    cp "$nvidia/driver.c" $here/driver/
    rm -r "$stub"
    ;;
package)
    pip_install --no-deps /opt/wheel/*.whl
    # A checkout made under a strict umask is its owner's alone; the image is everybody's.
    chmod -R a+rX $here
    finish
    ;;
*)
    echo "install.sh $1: torch, dependencies, driver or package is expected" >&2
    exit 2
    ;;
esac
