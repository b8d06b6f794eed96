#!/usr/bin/env bash
# On a machine with a GPU and without a network: builds em3, runs the GPU tests, then the benchmarks, the shortest useful
# set first, all within BUDGET seconds. Results are written as they come, so whatever was measured when time is up stays.
#
# PYTHON   an interpreter whose environment holds torch with CUDA and the extras test and bench, and setuptools and
#          pybind11 for the build; em3 is installed there, editable
# OUT      folder for tests.txt and for the results in quick/ and full/
# BUDGET   540 by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
budget=${BUDGET:-540}
mkdir -p "$out"

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# within COMMAND...: stop it, as Ctrl-C would, when the budget is spent. That is no failure.
within() {
    local left=$((budget - SECONDS)) status=0
    ((left > 5)) || { echo "no time is left for it"; return 0; }
    timeout --signal INT --kill-after 20 "$left" "$@" || status=$?
    ((status == 124)) || return "$status"
    echo "stopped when the time was up"
}

step "build"
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
"$python" -m em3.cli env | tee "$out/env.txt"
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'

step "GPU tests"
failed=0
within "$python" -m pytest -q tests/gpu 2>&1 | tee "$out/tests.txt" || failed=1

step "benchmarks, quick"
within "$python" -m em3.cli bench --device cuda --quick --out "$out/quick" || failed=1

step "benchmarks, all"
within "$python" -m em3.cli bench --device cuda --out "$out/full" || failed=1

step "done: $out"
exit "$failed"
