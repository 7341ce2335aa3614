#!/bin/sh
# Everything that needs a GPU, in minutes: kernels compiled, tested and measured; figures go to benchmarks/results/.
#
#   sh scripts/gpu_check.sh
#
#   PYTHON=python3      an interpreter with torch for CUDA (2.11 or newer) and cuda-core; nothing is installed
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
say() { printf '%s\n' "$*" >&2; }

"$python" - <<'PROBE' || exit 1
import sys
try:
    import cuda.core, torch
except ImportError as error:
    sys.exit(f"{error}: `pip install cuda-core`, and a torch that is built for CUDA")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
PROBE

name=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
report=benchmarks/results/$(date -u +%Y-%m-%d)-$name.md
failed=0

say "testing the kernels on $name"
if "$python" -c 'import pytest, pytest_asyncio, pytest_timeout, hypothesis' 2>/dev/null; then
  timeout 150 "$python" -m pytest -q -m gpu tests/gpu tests/unit/cuda_ops/cuda >&2 || failed=1
  if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck; do
      say "compute-sanitizer $tool"
      timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -x -m gpu \
        tests/unit/cuda_ops/cuda/test_gpu_attention.py tests/unit/cuda_ops/cuda/test_gpu_quantised.py -k "odd_lengths or chunks or few_rows" >&2 || failed=1
    done
  else
    say "skipped: compute-sanitizer is not there"
  fi
else
  say "skipped: pytest with pytest-asyncio, pytest-timeout and hypothesis is not there"
  failed=1
fi

say "measuring"
{
  printf '# Kernels and engine on %s\n\n' "$name"
  printf 'Commit %s, %s UTC.\n\n## Kernels\n\n' "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(date -u '+%Y-%m-%d %H:%M')"
  timeout 120 "$python" -m benchmarks kernels --short || { failed=1; printf '\nended early\n'; }
  if "$python" -m benchmarks engine --help 2>/dev/null | grep -q -- --device; then
    printf '\n## Engine\n\n```\n'
    timeout 120 "$python" -m benchmarks engine --device cuda || { failed=1; printf '\nended early\n'; }
    printf '```\n'
  fi
} >"$report"
say "figures: $report"
exit "$failed"
