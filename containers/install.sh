#!/bin/sh
# install.sh torch|dependencies|package: one layer of the image's environment, the slowest to change first.
# The pip that installs lies outside of the environment and stays out of the image. Nothing is ever compiled.
set -eu
here=/opt/tsae
pip_install() {
    /opt/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary :all: --constraint $here/constraints.txt "$@"
}

case $1 in
torch)
    python3 -m venv --without-pip /opt/venv
    version=$(sed -n 's/^torch==//p' $here/constraints.txt)
    case $TORCH in
    cuda) pip_install "torch==$version" ;;
    cpu) pip_install ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} "torch==$version+cpu" ;;
    *) echo "TORCH=$TORCH: cuda or cpu is expected" >&2 && exit 2 ;;
    esac
    ;;
dependencies)
    /opt/venv/bin/python - >/tmp/dependencies.txt <<'PY'
import tomllib

with open("/opt/tsae/pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
PY
    pip_install --requirement /tmp/dependencies.txt
    rm /tmp/dependencies.txt
    ;;
package)
    pip_install --no-deps /opt/wheel/*.whl
    # A program started by its path finds launch/'s modules beside each other, whatever PYTHONSAFEPATH says.
    echo $here/launch >"$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tsae-launch.pth"
    /opt/venv/bin/python -m compileall -q $here/launch
    ;;
esac
