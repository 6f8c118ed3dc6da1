#!/usr/bin/env bash
# All nodes of a hostfile, by ssh and pdsh.  Use, on one node: bash launch/deepspeed_multi_node.sh HOSTFILE CONFIG [OPTIONS OF train]
# Without ssh, on every node:  NODE_RANK=N bash launch/deepspeed_multi_node.sh --no_ssh HOSTFILE CONFIG [OPTIONS OF train]
# HOSTFILE has a line `HOST slots=GPUS` a node; NODE_RANK is the line's number, from 0. The checkout, its .venv, the
# working directory and the run's folder must be at the same place on all nodes. MASTER_ADDR (default: the first host),
# MASTER_PORT (29500), SSH_PORT (22). DeepSpeed passes few variables on to the nodes: the ones below are added.
# COMMAND=doctor looks at all nodes together instead of training.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ ! -d "$ROOT/.venv/bin" ] || export PATH="$ROOT/.venv/bin:$PATH"
LAUNCH=()
if [ "${1:-}" = --no_ssh ]; then
    LAUNCH=(--no_ssh --node_rank "${NODE_RANK:?is not set: the line number of this node in the hostfile, from 0}")
    shift
elif [ -n "${SSH_PORT:-}" ]; then
    LAUNCH=(--ssh_port "$SSH_PORT")
fi
[ $# -gt 1 ] || { echo "${BASH_SOURCE[0]}: needs a hostfile and a config; its use is in its second line" >&2; exit 2; }
HOSTFILE="$1"
shift
[ -f "$HOSTFILE" ] || { echo "${BASH_SOURCE[0]}: hostfile $HOSTFILE: no such file" >&2; exit 2; }
mapfile -t HOSTS < <(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$HOSTFILE")
LAUNCH+=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-${HOSTS[0]:-}}" --master_port "${MASTER_PORT:-29500}")

OPTIONS=("$@")
if [[ " ${LAUNCH[*]} " != *" --no_ssh "* ]]; then
    # No token or key among them: they are seen in the nodes' lists of processes. The hub's lies in ~/.cache/huggingface,
    # that of W&B in ~/.netrc.
    DS_ENV_FILE="$(mktemp)"
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    # DeepSpeed reads NAME=VALUE in every line, and ends at a blank one or a comment.
    cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_][A-Za-z0-9_]*=' >"$DS_ENV_FILE" || true
    env | grep -E '^(NCCL|GLOO|TORCH|OMP|DS|HF|REVPATCH|PYTORCH|WANDB|MLFLOW)_[A-Z0-9_]+=' |
        grep -vE '^([A-Z0-9_]*(TOKEN|KEY|PASSWORD)[A-Z0-9_]*|DS_ENV_FILE)=' >>"$DS_ENV_FILE" || true
    # pdsh hands words to a shell there; deepspeed puts those with a space in double quotes and leaves the others as they
    # are. In the quotes these three mean something; the others are quoted here. Of one host deepspeed starts the ranks
    # without pdsh, as they are.
    for i in "${!OPTIONS[@]}"; do
        [ ${#HOSTS[@]} -gt 1 ] || break
        if [[ "${OPTIONS[i]}" == *" "* ]]; then
            OPTIONS[i]="$(sed 's/[\\$`]/\\&/g' <<<"${OPTIONS[i]}")"
        else
            printf -v "OPTIONS[$i]" %q "${OPTIONS[i]}"
        fi
    done
fi
deepspeed "${LAUNCH[@]}" --module revpatch "${COMMAND:-train}" "${OPTIONS[@]}"
