#!/usr/bin/env bash
# shellcheck disable=SC2329 # the parts are called by name, in the bash that timeout starts
#
# Everything that needs a GPU, in one run of at most 10 minutes: one result file for each part.
#
#     bash benchmarks/gpu.sh                    all parts
#     bash benchmarks/gpu.sh sanitize ops       some of: build test sanitize ops block families
#                                             end_to_end
#     bash benchmarks/gpu.sh --force block      again, although it is done
#
# Results (.json, to be committed) and logs go to $OUT (benchmarks/results/gpu), $PYTHON is the
# interpreter (python3).  A part that ended well is not run again at the same commit, so a run that
# was cut off goes on where it was.  The exit status is 0 if every part that was asked for is green,
# 1 if not, 2 for bad use.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

export PYTHON=${PYTHON:-python3}
export OUT=${OUT:-benchmarks/results/gpu}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

readonly PARTS=(build test sanitize ops block families end_to_end)
declare -rA SECONDS_OF=([build]=50 [test]=150 [sanitize]=80 [ops]=75 [block]=90 [families]=70 [end_to_end]=85)
readonly LEFT_OUT=77 # status of a part that cannot run here, though nothing is wrong

refuse() {
    echo "gpu.sh: $1" >&2
    exit 2
}

# --- the parts -----------------------------------------------------------------------------------

run_build() {
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e . || return
    (cd benchmarks && "$PYTHON" -c \
        'import json, timing; print(json.dumps(timing.machine("cuda"), indent=1))') |
        tee "$OUT/machine.json"
}

run_test() {
    "$PYTHON" -m pytest -q -m gpu --require-backends reference,triton --junitxml "$OUT/test.xml"
}

# Only our kernels are instrumented: those of libraries are many, slow to check and not ours to mend.
run_sanitize() {
    local sanitizer name tool filters=() status=0
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [[ ! -x $sanitizer ]]; then
        echo "compute-sanitizer is not installed here (it comes with the CUDA toolkit)"
        return "$LEFT_OUT"
    fi
    while read -r name; do
        filters+=(--kernel-name "kns=$name")
    done < <(sed -nE 's/^def (_[a-z_]+_kernel)\(.*/\1/p' toca_kernels/triton/*.py)
    # Without torch's cache of memory every tensor has its own limits, and no old contents.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        "$sanitizer" --tool "$tool" --error-exitcode 1 "${filters[@]}" \
            "$PYTHON" -m pytest -q -m gpu -k small tests/test_gpu.py || status=1
    done
    return "$status"
}

run_ops() {
    "$PYTHON" benchmarks/ops.py --device cuda --json "$OUT/ops.json"
}

run_block() {
    "$PYTHON" benchmarks/block.py --device cuda --size XL --tokens 256 --batch 2 8 64 \
        --dtype bfloat16 --ratio 0.07 --repeats 20 --compile --json "$OUT/block.json"
}

run_families() {
    if ! "$PYTHON" -c 'import diffusers'; then
        echo "diffusers is not installed here, whose blocks are timed"
        return "$LEFT_OUT"
    fi
    "$PYTHON" benchmarks/families.py --device cuda --seconds 1 --ratio preset 0.1 0.3 \
        --rows flux-double pixart-1024 wan-1.3b flux-single pixart-512 stdit3-480p --json "$OUT/families.json"
}

run_end_to_end() {
    "$PYTHON" benchmarks/end_to_end.py --device cuda --batch 2 8 64 --round-k-to 16 \
        --json "$OUT/end_to_end.json"
}

# --- running them --------------------------------------------------------------------------------

run_part() {
    local part=$1 started=$SECONDS status
    if [[ -z $force && -f $OUT/$part.ok && $(<"$OUT/$part.ok") == "$commit" ]]; then
        report+=("$part: done before, at this commit")
        return
    fi
    rm -f "$OUT/$part.ok"
    echo "=== $part (at most ${SECONDS_OF[$part]} s)"
    timeout --kill-after=5 "${SECONDS_OF[$part]}" \
        bash -o pipefail -c "run_$part" 2>&1 | tee "$OUT/$part.log"
    status=${PIPESTATUS[0]}
    case $status in
        0)
            echo "$commit" >"$OUT/$part.ok"
            report+=("$part: green, $((SECONDS - started)) s")
            ;;
        "$LEFT_OUT") report+=("$part: left out, $(tail -n 1 "$OUT/$part.log")") ;;
        124 | 137) red=1 report+=("$part: RED, stopped after ${SECONDS_OF[$part]} s") ;;
        *) red=1 report+=("$part: RED, status $status, see $OUT/$part.log") ;;
    esac
}

force="" red=0 report=() chosen=()
for argument in "$@"; do
    case " --force ${PARTS[*]} " in
        *" $argument "*) ;;
        *) refuse "expected --force or some of ${PARTS[*]}, got '$argument'" ;;
    esac
    if [[ $argument == --force ]]; then force=1; else chosen+=("$argument"); fi
done
((${#chosen[@]})) || chosen=("${PARTS[@]}")

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    refuse "$PYTHON finds no torch with a CUDA device: run this on a machine with an NVIDIA GPU"

mkdir -p "$OUT" || exit 2
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
export LEFT_OUT
export -f run_build run_test run_sanitize run_ops run_block run_families run_end_to_end
for part in "${chosen[@]}"; do run_part "$part"; done

echo "=== $commit"
printf '%s\n' "${report[@]}"
exit "$red"
