#!/usr/bin/env bash
# On a machine with a GPU and without a network: builds em3, runs the GPU tests, then the benchmarks, the shortest useful
# set first, all within BUDGET seconds. Results are written as they come, so whatever was measured when time is up stays.
#
# PYTHON   an interpreter whose environment holds torch with CUDA and the extras test and bench, and setuptools and
#          pybind11 for the build; em3 is installed there, editable
# OUT      folder for tests.txt and for the results in quick/ and full/
# BUDGET   540 by default
# GRACE    seconds that a command has to write what it has when its time is up, 20 by default
# RESUME   1 to go on with the results in OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
budget=${BUDGET:-540}
if [[ -e $out/quick/results.jsonl && ${RESUME:-0} != 1 ]]; then
    echo "OUT: $out holds results; go on with them by RESUME=1, or name another folder" >&2
    exit 1
fi
mkdir -p "$out"

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# within MOST COMMAND...: stop it, as Ctrl-C would, after MOST seconds or when the budget is spent. That is no failure.
within() {
    local left=$((budget - SECONDS)) status=0
    ((left > 5)) || { echo "no time is left for it"; return 0; }
    local most=$((left < $1 ? left : $1))
    local until=$((SECONDS + most))
    timeout --signal INT --kill-after "${GRACE:-20}" "$most" "${@:2}" || status=$?
    # 137: it did not heed Ctrl-C and was killed.
    ((status == 124 || (status == 137 && SECONDS >= until))) || return "$status"
    echo "stopped when the time was up"
}

# benchmarks FOLDER OPTIONS...: each suite in a process of its own, lest a kernel that breaks the GPU's context takes those
# after it along.
benchmarks() {
    local suite
    for suite in qformer_attention lora_target_attention contrastive_loss lora_linear strategies overhead end_to_end; do
        step "benchmarks, $1: $suite"
        within "$budget" "$python" -m em3.cli bench "$suite" --device cuda --resume --out "$out/$1" "${@:2}" || failed=1
    done
}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")'

step "build"
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
"$python" -m em3.cli env | tee "$out/env.txt"

step "GPU tests, for a third of the time at most"
failed=0
within "$((budget / 3))" "$python" -m pytest -q tests/gpu 2>&1 | tee "$out/tests.txt" || failed=1

benchmarks quick --quick
benchmarks full

step "done: $out"
exit "$failed"
