#!/usr/bin/env bash
# All evidence on one machine, in one command; made for a bare GPU machine, nothing to download:
#
#     bench/gpu.sh [--minutes 9] [--wheels FOLDER] [--output FOLDER] [--from ARCHIVE] [--reduced]
#
# It stops when its minutes are over; the same command goes on from there, or, on another bare
# machine, with --from and the archive that the last one left: nothing else is needed of it.
# --reduced runs every step start to end on a CPU. Exit code: 0 all is done; 75 time ran out; 1 all
# had its turn and something failed, which the same command tries again; 2 nothing was started.
#
# The steps, the most telling first, as about half an hour is all there may be:
#
#   smoke                     a minute: import, every kernel once against float64, products from half
#                             precision to float32, a CUDA graph
#   profile                   a call's kernels by time, and what is left between them
#   left-out                  the same with a gradient_tolerance, where some tokens are likelier
#   bench-headline            the floor and the main peers at N = 8,192, bfloat16: GRPO from hidden
#                             states of width 4,096 and 1,024 and from logits at two vocabularies,
#                             DPO and SFT from hidden states
#   correctness               ours and eager's errors against float64, at real sizes; N·V > 2³¹
#   graphs, opcheck           capture and replay in a CUDA graph; torch.library.opcheck of every op
#   ncu, dram                 bytes a logit the row kernels move, counted by the GPU
#   sanitizer-…               every kernel on small shapes under compute-sanitizer
#   tests                     tests/kernels and tests/ops, on all cores
#   bench-gpu                 all peers and the rest of the suite: KTO, SFT, half the rows active, …
#   configurations            warps to commit in kernels/launch.py
#   bench-gpu-active, …       sweeps over active rows, logit scale, tokens
#   correctness-rest          all other dtypes, vocabularies and fractions of rows
#   report, model             what came of it
#
# A step that is killed because time ran out, or fails, has its next turn after all the others.
#
# FOLDER, by default $OUT or runs/gpu, holds one file: gpu-results.tar.gz, written anew after each
# step. In it, in a folder named after the GPU and the day: results.json, checks.jsonl,
# profile.jsonl, left-out.jsonl, configurations.jsonl, ncu.csv, ncu.json, log; machines.jsonl, a
# line for each time this was started; and which steps are done, failed, late (a line for each time
# that one ran out of time).
#
# --wheels installs the peers without their dependencies; a peer that is missing is skipped and says
# so. `pip download --no-deps --only-binary=:all: --python-version 3.12` fetches a wheel. Beside
# torch, Triton, numpy and what transformers and accelerate need, the peers need those of
#
#   trl                 trl datasets dill multiprocess xxhash pandas pyarrow
#   liger-kernel        liger-kernel
#   cut-cross-entropy   cut-cross-entropy
#   quack               quack-kernels apache-tvm-ffi torch-c-dlpack-ext einops nvidia-cutlass-dsl
#                       nvidia-cutlass-dsl-libs-{core,base,cu12,cu13} cuda-bindings cuda-pathfinder
#                       protobuf
#   verl                verl "tensordict>=0.8,<=0.10" "pyvers<0.2" cloudpickle orjson importlib-metadata zipp
#                       ray click jsonschema msgpack protobuf hydra-core "omegaconf<2.4"
#                       antlr4-python3-runtime==4.9.3 (an sdist: `pip wheel` it) torchdata codetiming
#                       pylatexenc peft pandas pyarrow "transformers>=5.5.3,<5.11,!=5.6.0"
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
minutes=9 wheels="" output=${OUT:-runs/gpu} from="" reduced=""
while (($#)); do
    case "$1" in
    --minutes) minutes=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    --from) from=$2; shift 2 ;;
    --reduced) reduced=--reduced; shift ;;
    *) echo "gpu.sh: unknown option $1 (see the top of the file)" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PATH=$PATH:/usr/local/cuda/bin # where compute-sanitizer and ncu are, if nobody said so

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
    PYTHONPATH="$PYTHONPATH:$site"
fi
if [ -z "$reduced" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no GPU here; --reduced runs every step on a CPU" >&2
    exit 2
fi
archive=$output/gpu-results.tar.gz
if [ -z "$from" ] && [ -e "$archive" ]; then from=$archive; fi
mkdir -p "$output" && scratch=$(mktemp -d) || exit
if [ -n "$from" ]; then
    tar -xzf "$from" -C "$scratch" || { echo "gpu.sh: $from is no archive of results" >&2; exit 2; }
else
    device=$("$python" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "reduced-on-cpu")') || exit
    mkdir "$scratch/$(tr -cs 'A-Za-z0-9\n' - <<<"$device")-$(date +%F)"
fi
results=$(echo "$scratch"/*)
touch "$results"/{done,failed,late} || exit
end=$((minutes * 60)) # on the clock of SECONDS, which began with this script

# pack: all there is to the archive; a kill meanwhile leaves the last one
pack() { tar -czf "$archive.part" -C "$scratch" . && mv "$archive.part" "$archive"; }

# step NAME COMMAND…: run it within the time that is left, if it is its turn
step() {
    local name=$1 left=$((end - SECONDS)) code
    shift
    if times done || times failed || times late "$turn"; then return; fi
    if ((left < 20)); then stop; fi
    echo "== $name ($left s left)" | tee -a "$results/log"
    timeout --signal=INT --kill-after=10 "$left" "$@" 2>&1 | tee -a "$results/log"
    code=${PIPESTATUS[0]}
    if ((code == 137 && SECONDS < end)); then code="137: killed, out of memory?"; fi
    case $code in
    0) echo "$name" >>"$results/done" ;;
    75) stop ;; # it saved what it has, and goes on next
    124 | 137) echo "$name" >>"$results/late"; stop ;;
    *) echo "$name" >>"$results/failed"; echo "FAILED $name ($code)" | tee -a "$results/log" ;;
    esac
    pack
}
# times FILE [N]: whether $name is written in FILE, more than N times
times() { (($(grep -cxF -e "$name" "$results/$1") > ${2:-0})); }
stop() {
    echo "gpu.sh: time is up; the same command with --output $output goes on, or --from $archive elsewhere" >&2
    exit 75
}
# under NAME TOOL OPTIONS… -- COMMAND…: a step in a program of the CUDA toolkit; --reduced can do
# without
under() {
    local name=$1 tool=()
    shift
    while [ "$1" != -- ]; do tool+=("$1"); shift; done
    shift
    if command -v "${tool[0]}" >/dev/null; then step "$name" "${tool[@]}" "$@"
    elif [ -n "$reduced" ]; then step "$name" "$@"
    else step "$name" echo "skipped: ${tool[0]} is not on the PATH"; fi
}
gpu() { # NAME FUNCTION: a step of bench/gpu/steps.py
    step "$1" "$python" -m bench.gpu "$2" $reduced --output "$results"
}
bench() { # NAME REPEATS OPTIONS…: results are saved one by one, and it goes on by itself
    local name=$1 repeats=$2
    shift 2
    step "bench-$name" "$python" -m bench --output "$results/results.json" \
        --seconds $((end - SECONDS - 40)) --repeats "$repeats" "$@"
}

steps() {
    gpu smoke smoke
    step environment "$python" -m humanline.cli doctor
    gpu profile where_the_time_goes
    gpu left-out left_out
    if [ -n "$reduced" ]; then
        bench smoke 1 --suite smoke --peers 'bare GEMMs' eager humanline
    else
        bench headline 5 --suite gpu-headline --peers 'bare copy' 'bare GEMMs' eager \
            'Liger chunked' 'Liger grpo_loss' 'Liger fused linear CE' cut-cross-entropy quack humanline
    fi
    gpu correctness correctness
    gpu graphs graphs
    gpu opcheck ops
    under ncu ncu --csv --print-units base --clock-control none --profile-from-start no \
        --kernel-name 'regex:^humanline_(token_loss|token_logps|scale)' \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        --log-file "$results/ncu.csv" -- "$python" -m bench.gpu kernels $reduced --output "$results"
    gpu dram dram
    local check file checks=(memcheck racecheck)
    if [ -n "$reduced" ]; then checks=(memcheck); fi # without the tool they are the same
    for check in "${checks[@]}"; do # each tensor in memory of its own, or memcheck sees no edges
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 under "sanitizer-$check" \
            compute-sanitizer --tool "$check" --error-exitcode 1 -- \
            "$python" -m bench.gpu small $reduced --output "$results"
    done
    local tests=(tests/{kernels,ops})
    if [ -n "$reduced" ]; then tests=(tests/ops/hidden/test_gemms.py); fi
    step tests "$python" -m pytest -q -p no:cacheprovider -n "$(nproc)" "${tests[@]}"
    if [ -z "$reduced" ]; then bench gpu 5 --suite gpu; fi
    gpu configurations configurations
    if [ -z "$reduced" ]; then
        bench gpu-active 3 --suite gpu-active
        bench gpu-scale 1 --suite gpu-scale
        bench gpu-tokens 3 --suite gpu-tokens
    fi
    gpu correctness-rest correctness_rest
    step report "$python" -m bench --show "$results/results.json"
    step model "$python" -m bench.paper.model "$results/results.json"
}

if ! "$python" -m bench.gpu machine --output "$results"; then
    echo "gpu.sh: name another folder with --output" >&2
    rm -r "$scratch"
    exit 2
fi
trap 'pack; rm -r "$scratch"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
for ((turn = 0; turn <= $(wc -l <"$results/late"); turn++)); do steps; done

if [ -s "$results/failed" ]; then
    echo "gpu.sh: FAILED:" $(<"$results/failed")"; see the log in $archive;" \
        "the same command tries again" >&2
    : >"$results/failed"
    exit 1
fi
echo "gpu.sh: all done; tar -xzf $archive -C bench/results, then: python -m bench.plots," \
    "python -m bench.readme"
