#!/usr/bin/env bash
# All evidence on one machine, in one command; made for a bare GPU machine, nothing to download:
#
#     bench/gpu.sh [--minutes 9] [--wheels FOLDER] [--output FOLDER] [--reduced]
#
# Every step that is done is written down in FOLDER/done, so the same command goes on where the time
# ran out (exit code 75). --wheels installs the peers (`pip download --no-deps` fetches them; a peer
# that is missing is skipped and says so). --reduced runs every step start to end on a CPU.
# FOLDER: results.json, checks.jsonl, configurations.jsonl, ncu.csv, log, done.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
minutes=9 wheels="" output="" reduced=""
while (($#)); do
    case "$1" in
    --minutes) minutes=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    --reduced) reduced=--reduced; shift ;;
    *) echo "gpu.sh: unknown option $1 (see the top of the file)" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
    PYTHONPATH="$PYTHONPATH:$site"
fi
if [ -z "$reduced" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no GPU here; --reduced runs every step on a CPU" >&2
    exit 2
fi
if [ -z "$output" ]; then
    device=$("$python" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "reduced-on-cpu")') || exit
    output=bench/results/$(tr -cs 'A-Za-z0-9\n' - <<<"$device")-$(date +%F)
fi
mkdir -p "$output" && touch "$output/done" || exit
end=$((SECONDS + ${minutes} * 60))
failed=()

# step NAME COMMAND…: run it unless it is done, within the time that is left
step() {
    local name=$1 left=$((end - SECONDS)) code
    shift
    grep -qx "$name" "$output/done" && return
    if ((left < 20)); then stop; fi
    echo "== $name ($left s left)" | tee -a "$output/log"
    timeout --signal=INT --kill-after=10 "$left" "$@" 2>&1 | tee -a "$output/log"
    code=${PIPESTATUS[0]}
    case $code in
    0) echo "$name" >>"$output/done" ;;
    75 | 124 | 137) stop ;;
    *) failed+=("$name"); echo "$name" >>"$output/done"; echo "FAILED $name ($code)" | tee -a "$output/log" ;;
    esac
}
stop() {
    echo "gpu.sh: time is up; the same command with --output $output goes on" >&2
    exit 75
}
# with_tool NAME TOOL COMMAND…: a step that needs a program of the CUDA toolkit
with_tool() {
    local name=$1 tool=$2
    shift 2
    if command -v "$tool" >/dev/null; then step "$name" "$@"; else
        step "$name" echo "skipped: $tool is not on the PATH"
    fi
}
gpu() { echo "$python" -m bench.gpu "$@" $reduced --output "$output"; }
suite() { # a bench suite, which saves case by case and goes on by itself
    local name=$1 repeats=$2
    shift 2
    step "bench-$name" "$python" -m bench --suite "$name" --output "$output/results.json" \
        --seconds $((end - SECONDS - 60)) --repeats "$repeats" "$@"
}

step environment "$python" -m humanline.cli doctor
if [ -n "$reduced" ]; then
    step kernel-tests "$python" -m pytest -q -p no:cacheprovider tests/ops/test_gemms.py
else
    step kernel-tests "$python" -m pytest -q -p no:cacheprovider tests/kernels tests/ops
fi
step correctness $(gpu correctness)
step opcheck $(gpu ops)
step graphs $(gpu graphs)
for check in memcheck racecheck; do
    with_tool "sanitizer-$check" compute-sanitizer \
        compute-sanitizer --tool "$check" --error-exitcode 1 "$python" -m bench.gpu kernels --reduced
done
if [ -n "$reduced" ]; then
    suite smoke 1 --peers 'bare GEMMs' eager humanline
else
    suite gpu 5
fi
with_tool ncu ncu ncu --csv --clock-control none --kernel-name 'regex:_forward|_backward|_token_loss|_scale' \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
    --log-file "$output/ncu.csv" $(gpu kernels)
step configurations $(gpu configurations)
if [ -z "$reduced" ]; then
    suite gpu-active 3
    suite gpu-scale 1
    suite gpu-tokens 3
fi
step report "$python" -m bench --show "$output/results.json"
step model "$python" -m bench.model "$output/results.json"

if ((${#failed[@]})); then
    echo "gpu.sh: FAILED: ${failed[*]}; see $output/log" >&2
    exit 1
fi
echo "gpu.sh: all done; see $output, then: python -m bench.plots, python -m bench.readme"
