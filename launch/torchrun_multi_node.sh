#!/usr/bin/env bash
# One node of several, by torchrun's rendezvous.  Use, on every node: NODES=2 RDZV=HOST0:29400 bash launch/torchrun_multi_node.sh CONFIG [OPTIONS OF train]
# RANKS: ranks a node (default: its GPUs). RESTARTS: how often the ranks are started again after one has died (3); they
# go on from the newest snapshot. RUN_ID: tells two runs at one HOST0:PORT apart. STOP_SECONDS: how long ranks have for
# their snapshot when torchrun is told to stop (30; another number needs torch 2.13).
# COMMAND=doctor looks at all nodes together instead of training.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ ! -d "$ROOT/.venv/bin" ] || export PATH="$ROOT/.venv/bin:$PATH"
: "${NODES:?is not set: say how many nodes there are}" "${RDZV:?is not set: HOST:PORT of one of the nodes}"
[ $# -gt 0 ] || { echo "${BASH_SOURCE[0]}: no config; its use is in its second line" >&2; exit 2; }

# A doctor that has found something red exits with 1: that is its answer, and no death.
[ "${COMMAND:-train}" = train ] || RESTARTS=0
# Ranks that are started again meet in a new store: in the old one they may read the address of one that has died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# exec: the signal that ends a container or a job step must reach torchrun, which passes it on.
exec torchrun --nnodes "$NODES" --nproc_per_node "${RANKS:-gpu}" --max_restarts "${RESTARTS:-3}" \
    ${STOP_SECONDS:+--shutdown_timeout "$STOP_SECONDS"} \
    --rdzv_backend c10d --rdzv_endpoint "$RDZV" --rdzv_id "${RUN_ID:-revpatch}" -m revpatch "${COMMAND:-train}" "$@"
