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
vae() { # NAME OPTION...: one run of bench_vae.py
    local name=$1
    shift
    python benchmarks/bench_vae.py --device cuda --threads 8 "$@" --json "$out/vae-$name.json" | tee "$out/vae-$name.txt"
}
for side in 1024 2048; do
    vae "float32-$side" --dtype float32 --models reference sd --parts compare --side "$side"
done
for dtype in float16 bfloat16; do
    for side in 1024 2048 4096; do
        vae "$dtype-$side" --dtype "$dtype" --models sd --parts compare --side "$side" --ram-shares 0.5 0.25
    done
done
vae half --models reference sd --parts half --half-side 1024
vae frame --parts frame --frame-side 1024 --video-channels 96 # full size
vae beyond-reference --parts --beyond-models reference --beyond 4 16 64 --tiles 1024 640
vae beyond-sd --dtype float16 --parts --beyond-models sd --beyond 4 16 40 --tiles 1024 640
# 12288 x 12288 pixels' worth: one pass, and attention to a part of the keys.
vae beyond-150 --dtype float16 --parts --beyond-models sd --beyond 150 --tiles 1024 640 \
    --beyond-mode sampled --attention-keys 16384
