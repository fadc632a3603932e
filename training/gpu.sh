#!/usr/bin/env bash
# Trains every stage on one large GPU in calls of at most LEASE minutes; run it again until it says "done".
#
#   DATA="photos/train-*.tar" OUT=runs/gpu KIND=tiny bash training/gpu.sh
#
# DATA   pattern of tar shards or folders        OUT    folder of all runs; keep it between calls
# KIND   tiny or kl (AutoencoderKL, no attention) LEASE  minutes of one call (default 8.5)
# VAE_MINUTES, UNET_MINUTES, DECODER_MINUTES  training time of the stages in all (defaults 8, 24 and 4)
# ROUNDS encodings of a picture (default 8)     WORKERS loader processes (default: all cores)
set -euo pipefail
DATA=${DATA:?pattern of the photographs, such as photos/train-*.tar}
OUT=${OUT:-runs/gpu} KIND=${KIND:-tiny} LEASE=${LEASE:-8.5} ROUNDS=${ROUNDS:-8}
VAE_MINUTES=${VAE_MINUTES:-8} UNET_MINUTES=${UNET_MINUTES:-24} DECODER_MINUTES=${DECODER_MINUTES:-4} PYTHON=${PYTHON:-python}
WORKERS=${WORKERS:-$(nproc)}

left() { "$PYTHON" -c "print(max(0.0, $LEASE - $SECONDS / 60))"; }
enough() { "$PYTHON" -c "raise SystemExit(not $(left) > $1)"; }
again() { echo "lease used at $1; run the same command again"; exit 0; }
complete() { # folder minutes: whether the run in this folder has used its budget
    "$PYTHON" - "$1" "$2" <<'PYTHON'
import json, pathlib, sys
state = pathlib.Path(sys.argv[1], "checkpoint", "state.json")
raise SystemExit(not (state.is_file() and json.loads(state.read_text())["elapsed_s"] >= 60 * float(sys.argv[2])))
PYTHON
}

if ! complete "$OUT/vae" "$VAE_MINUTES"; then
    enough 0.5 || again "the autoencoder"
    "$PYTHON" -m training.vae --data "$DATA" --out "$OUT/vae" --kind "$KIND" --batch-factor 8 --lr 1e-3 \
        --minutes "$VAE_MINUTES" --lease-minutes "$(left)" --workers "$WORKERS"
    complete "$OUT/vae" "$VAE_MINUTES" || again "the autoencoder"
fi
for ((round = 0; round < ROUNDS; round++)); do
    [[ -d "$OUT/latents/$(printf 'round-%03d' "$round")" ]] && continue
    enough 1.5 || again "the latents"
    "$PYTHON" -m training.latents --data "$DATA" --vae "$OUT/vae" --out "$OUT/latents" --rounds 1 --first-round "$round"
done
if ! complete "$OUT/unet" "$UNET_MINUTES"; then
    enough 0.5 || again "the denoiser"
    "$PYTHON" -m training.unet --latents "$OUT/latents" --out "$OUT/unet" --batch-factor 8 --lr 1e-3 --ema 0.9995 \
        --minutes "$UNET_MINUTES" --lease-minutes "$(left)" --workers "$WORKERS"
    complete "$OUT/unet" "$UNET_MINUTES" || again "the denoiser"
fi
if [[ ! -d "$OUT/samples" ]]; then
    enough 2 || again "the samples"
    "$PYTHON" -m training.samples --data "$DATA" --latents "$OUT/latents" --unet "$OUT/unet" --out "$OUT/samples" --batch 32
fi
if ! complete "$OUT/decoder" "$DECODER_MINUTES"; then
    enough 0.5 || again "the decoder"
    "$PYTHON" -m training.decoder --vae "$OUT/vae" --samples "$OUT/samples" --out "$OUT/decoder" --batch 64 \
        --minutes "$DECODER_MINUTES" --lease-minutes "$(left)" --workers "$WORKERS"
    complete "$OUT/decoder" "$DECODER_MINUTES" || again "the decoder"
fi
"$PYTHON" -m training.export --vae "$OUT/vae" --unet "$OUT/unet" --decoder "$OUT/decoder" --out "$OUT/model" --hardware "one GPU"
echo "done: $OUT/model"
