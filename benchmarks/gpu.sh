#!/usr/bin/env bash
# Everything that wants a CUDA device, in one command: bash benchmarks/gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
python -m pytest -m gpu -q 2>&1 | tee "$out/tests.txt"
for dtype in float32 float16 bfloat16; do
    python benchmarks/bench_denoise.py --device cuda --dtype "$dtype" --tile 512 --side 4096 --json "$out/denoise-$dtype.json" |
        tee "$out/denoise-$dtype.txt"
done
