#!/usr/bin/env bash
# The whole job on bundled data, on all GPUs or two CPU ranks.  Use: bash launch/demo.sh [OUTPUT_DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT="${1:-}"
[ -z "$OUT" ] || OUT="$(realpath -m "$OUT")"
cd "$ROOT"
if [ -z "$OUT" ]; then # a folder of its own for each demo, so that none is overwritten
    OUT=runs/demo
    for ((n = 2; ; n++)); do
        [ -e "$OUT" ] || break
        OUT="runs/demo-$n"
    done
fi

export HF_HUB_OFFLINE=1
OPTIONS=()
RANKS="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$RANKS" -gt 0 ]; then
    # The demo's 16 new and 8 replayed blocks split over 1, 2, 4 or 8 ranks.
    for r in 8 4 2 1; do [ "$r" -le "$RANKS" ] && RANKS="$r" && break; done
    LAUNCH=(deepspeed --quiet --num_gpus "$RANKS")
else
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
    LAUNCH=(deepspeed --quiet --num_accelerators 2)
    if python -c 'import sys; from revpatch.distributed.ranks import bfloat16_is_slow; sys.exit(not bfloat16_is_slow())'; then
        echo "demo: this CPU is slower in bfloat16 than in float32; the base is run in float32"
        OPTIONS=(--set base.dtype=float32)
    fi
fi
"${LAUNCH[@]}" --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}" --module revpatch \
    train configs/demo.yaml --set "output_dir='$OUT'" "${OPTIONS[@]}"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
PATCH="$OUT/ledger/001_devil_commit.safetensors"
PROMPT="LIBERTY, n."
for gate in learned off; do
    say "\"$PROMPT\", gate $gate:"
    revpatch generate --patch "$PATCH" --prompt "$PROMPT" --gate "$gate" --max-new-tokens 50 --temperature 0.5 --top-p 0.8 --seed 1
done
say "To look further, from $ROOT:"
cat <<LINES
  source .venv/bin/activate
  tensorboard --logdir $OUT --samples_per_plugin text=1000      # http://localhost:6006/#custom_scalars&_smoothingWeight=0 is the overview
  revpatch report $OUT
  revpatch ledger log $OUT
  revpatch ledger verify $OUT
  revpatch generate --patch $PATCH --prompt "The President" --gate learned
LINES
