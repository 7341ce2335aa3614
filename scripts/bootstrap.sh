#!/bin/sh
# Makes the virtual environment and installs the project into it; costs nothing when that was done before.
#
#   sh scripts/bootstrap.sh [EXTRA...]      extras beside `embedded`, `worker` and `test`, e.g. check
#
#   PYTHON=python3.12     the interpreter to build on
#   VENV=.venv            where to build
#   TORCH_BACKEND=cpu     which torch to fetch: cpu, cu126, cu128, cu130 or auto (see `uv pip install --help`)
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
stamp=$venv/.ready

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# What is installed already stays: `make check` adds an extra, and `make test` after it changes nothing.
extras=embedded,worker,test
[ -f "$stamp" ] && extras=$(sed -n 2p "$stamp")
for extra in "$@"; do
  case ",$extras," in *",$extra,"*) ;; *) extras=$extras,$extra ;; esac
done
inputs=$(cat pyproject.toml constraints.txt scripts/bootstrap.sh | cksum | tr ' ' -)-${TORCH_BACKEND:-default}
wanted=$(printf '%s\n%s' "$inputs" "$extras")

# The CPU kernels: seconds once, nothing after that. Without a compiler plain torch does their work.
build_kernels() { "$venv/bin/python" cuda_ops/cpu/build.py || :; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then build_kernels; exit 0; fi

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
  die "Python 3.11, 3.12 or 3.13 is needed, and $python is none of them; PYTHON=/path/to/python chooses one"
if ! [ -x "$venv/bin/python" ]; then
  say "making the virtual environment in $venv"
  "$python" -m venv "$venv" ||
    die "$python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv, then remove $venv"
fi

# uv knows no pip setting; a folder of wheels that pip was told of is handed over.
: "${UV_FIND_LINKS:=${PIP_FIND_LINKS:-}}"
if [ -n "$UV_FIND_LINKS" ]; then export UV_FIND_LINKS; else unset UV_FIND_LINKS; fi

install_with_uv() { # [more options of `uv pip install`]
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -c constraints.txt "$@" -e ".[$extras]"
}

# On Linux x86_64 the registry's torch brings gigabytes of CUDA; a machine without a GPU can do without.
try_without_cuda() {
  [ -z "${TORCH_BACKEND:-}" ] && [ -z "${UV_FIND_LINKS:-}" ] || return 1
  [ "$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null 2>&1 || return 1
  UV_HTTP_RETRIES=0 install_with_uv --torch-backend cpu 2>/dev/null
}

install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv || return 1
  try_without_cuda && return 0
  if [ -n "${TORCH_BACKEND:-}" ]; then install_with_uv --torch-backend "$TORCH_BACKEND"; else install_with_uv; fi
}

say "installing throughline[$extras] into $venv (the first time takes a minute or more)"
install || {
  say "uv could not install; trying pip"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
}
printf '%s\n' "$wanted" >"$stamp"
build_kernels
