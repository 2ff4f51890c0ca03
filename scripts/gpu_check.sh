#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, triton, transformers and pytest. Sections by
# name, each within ten minutes; without one, the tests:
#
#   scripts/gpu_check.sh kernels engine       # the `gpu` tests; tests/kernels/test_ran.py holds the
#                                             # binaries that ran to the proof
#   scripts/gpu_check.sh graph slice shard mini glm wall profile      # `minidsv bench`
#   scripts/gpu_check.sh accuracy             # the bundled eval in every combination; if time runs
#                                             # out, again: it goes on where it stopped
#
# Logs and the JSON of every run go to $OUT (default: gpu_out). Exit status 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_out}
limit=${LIMIT_S:-560} # seconds for a section's longest process
failed=0
mkdir -p "$out"

# run NAME COMMAND...: in the background, its output in a log
run() {
    local name=$1
    shift
    OMP_NUM_THREADS=1 timeout "$limit" "$@" >"$out/$name.log" 2>&1 &
    names[$!]=$name
}

# Wait for all that run; print the end of each log, and of a failed one what failed.
collect() {
    local pid
    for pid in "${!names[@]}"; do
        local name=${names[$pid]} status=0
        wait "$pid" || status=$?
        echo "== $name: status $status: $(grep -v '^{' "$out/$name.log" | tail -n 1)"
        if ((status)); then
            failed=1
            grep -E '^(FAILED|ERROR|error:)' "$out/$name.log" | head -n 20
        fi
    done
    names=()
}
declare -A names=()

# check NAME TEST...: in a process of its own
check() {
    run "$1" python3 -m pytest -q -p no:cacheprovider "${@:2}"
}

kernels() {
    local file
    for file in $(grep -l 'mark\.gpu' tests/kernels/test_*.py); do
        [[ $file == *test_engine_triton* ]] || check "$(basename "$file" .py)" -m gpu "$file"
    done
    collect
}

engine() {
    local file test
    for file in tests/test_gpu*.py tests/test_fp8_activations.py tests/test_parity.py \
        tests/test_identities.py; do
        check "$(basename "$file" .py)" "$file"
    done
    file=tests/kernels/test_engine_triton.py
    for test in $(grep -oE '^def test_[a-z_0-9]+' "$file" | cut -c5-); do
        check "$test" -m gpu "$file::$test"
    done
    collect
}

# bench NAME CONFIG OPTION...: a measurement by itself on the device
bench() {
    local name=$1 config=$2
    shift 2
    run "$name" minidsv bench --model "configs/$config.json" --load-format random \
        --backend triton --kv-cache-dtype fp8 --max-model-len 65792 --json "$out/$name.json" "$@"
    collect
    grep -v '^{' "$out/$name.log"
}

section() {
    case $1 in
    kernels | engine) "$1" ;;
    graph)
        bench graph_slice v32_slice --graph --batch 1,8,64
        bench graph_glm glm52_slice --graph --batch 1
        ;;
    slice) bench slice v32_slice --batch 1,8,64 --context 4096,65536 --layers 3,5 ;;
    shard) bench shard v32_tp8_shard --batch 1,8,64 --context 4096,65536 --layers 3,5 ;;
    mini) bench mini mini --batch 1,8 --context 4096 --layers 14,27 ;;
    glm) bench glm glm52_slice --batch 1,8,64 --context 4096 ;;
    wall) bench wall v32_slice --wall --batch 1 --context 4096,65536 ;;
    profile) bench profile v32_slice --profile --batch 1 --context 4096 --plot "$out/profile.png" ;;
    accuracy)
        run accuracy python3 scripts/eval_matrix.py --device cuda --records "$out/records" \
            --write docs/ACCURACY.md --json "$out/accuracy.json"
        collect
        cp docs/ACCURACY.md "$out/"
        ;;
    *)
        echo "$1: no section; there are kernels engine graph slice shard mini glm wall profile" \
            "accuracy" >&2
        exit 2
        ;;
    esac
}

python3 -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
python3 -c "
import torch, transformers, triton
print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__,
      'transformers', transformers.__version__)" || exit 1
(($#)) || set -- kernels engine
for name; do
    section "$name"
done
exit "$failed"
