#!/usr/bin/env bash
# All that needs a GPU, in one call of under ten minutes, the most worth first:
#
#     bench/gpu.sh [FOLDER]        rows, report, targets and gpu.log go to FOLDER (bench/results)
#
# It runs from a plain checkout: nothing is installed, nothing is fetched. A part that fails or runs
# out of its time never stops the next, and every row stays that was written before.
#   PYTHON    the interpreter that has torch and triton (python3)
#   NANOGPT   a checkout of nanoGPT to measure beside
#   SECONDS_IN_ALL   when to be done (570)
#   DEVICE=cpu       tries the script itself on a machine without a GPU
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${1:-bench/results}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
SECONDS=0
mkdir -p "$OUT" || exit 1
exec > >(tee "$OUT/gpu.log") 2>&1

# kernels/, export/ and bench/ stand beside gptopt/ but are imported inside it.
TREE=$(mktemp -d) || exit 1
trap 'rm -rf "$TREE"' EXIT
mkdir "$TREE/gptopt"
ln -s "$PWD"/gptopt/* "$TREE/gptopt/"
ln -s "$PWD/kernels" "$PWD/export" "$PWD/bench" "$TREE/gptopt/"
export PYTHONPATH="$TREE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export PYTHONDONTWRITEBYTECODE=1

# part NAME SECONDS COMMAND...: in a box of that time, or of what is left, and said how it ended.
part() {
    local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS - 15)) began=$SECONDS
    shift 2
    ((limit > left)) && limit=$left
    if ((limit < 10)); then
        echo "== $name: no time left"
        return
    fi
    echo "== $name: at most $limit s, $SECONDS s behind us"
    timeout --signal=INT --kill-after=15 "$limit" "$@"
    echo "== $name: ended with $? after $((SECONDS - began)) s"
}

# bench NAME SECONDS WHAT ARGUMENTS...: it stops by itself before its box closes.
bench() {
    local name=$1 limit=$2 what=$3
    shift 3
    part "$name" "$limit" "$PYTHON" -m gptopt bench "$what" --device "$DEVICE" --out "$OUT" \
        --quick --append --minutes "$(awk "BEGIN {print ($limit - 20) / 60}")" "$@"
}

# Rows of an earlier call are of another state of the tree.
rm -f "$OUT"/{kernels,training,generate}.jsonl

part environment 30 "$PYTHON" - <<'PYTHON'
import importlib.util, platform, sys
import torch
print("python", platform.python_version(), sys.executable)
print("torch", torch.__version__, "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
for name in ("triton", "pydantic", "tokenizers", "safetensors", "numpy", "matplotlib", "pytest",
             "hypothesis", "xdist", "pytest_timeout", "liger_kernel"):
    if importlib.util.find_spec(name) is None:
        print("missing:", name, "(its wheel may be given by PYTHONPATH)")
PYTHON
command -v nvidia-smi > /dev/null && part nvidia-smi 15 nvidia-smi

workers=()
"$PYTHON" -c 'import xdist' 2> /dev/null && [ "$DEVICE" = cuda ] && workers=(-n 6)
if [ "$DEVICE" = cuda ]; then
    GPTOPT_TEST_GPU=1 part tests 85 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" \
        -m 'not slow' tests/kernels/triton
    part "step graph" 45 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/training/test_graph.py
fi
part doctor 40 "$PYTHON" -m gptopt doctor --kernels

bench "cross_entropy and layernorm" 95 kernels --only cross_entropy --only layernorm
bench "whole step" 130 training ${NANOGPT:+--nanogpt "$NANOGPT"}
FUSED=(--contenders gptopt --contenders "gptopt deterministic" --contenders "SDPA flash"
    --contenders "SDPA cuDNN" --contenders eager)
if [ "$DEVICE" = cuda ]; then
    bench "attention d64" 50 kernels --only attention:d64 "${FUSED[@]}"
else
    bench "attention" 50 kernels --only attention "${FUSED[@]}"
fi
bench ffn 80 kernels --only ffn
bench decode 45 generate
bench "decode kernels" 40 kernels --only attention_decode --contenders gptopt --contenders eager
if [ "$DEVICE" = cuda ]; then
    bench "attention d128" 45 kernels --only attention:d128 "${FUSED[@]}"
    # What is left goes to the peers that have to be compiled.
    bench "attention, compiled peers" 60 kernels --only attention:1024
fi

part report 30 "$PYTHON" -m gptopt.bench.report "$OUT"
echo "== done after $SECONDS s"
[ -f "$OUT/report.md" ] && sed -n '1,/^| operator/p' "$OUT/report.md" | sed '$d'
exit 0
