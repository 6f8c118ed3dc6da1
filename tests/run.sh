#!/usr/bin/env bash
# Linter, type checker and tests, with all set-up.  Use: bash tests/run.sh [--slow] [PYTEST ARGUMENTS]
# --slow adds the tests that take minutes, as CI does, and first installs what they need of Debian's packages. The exit
# code is that of the first thing that failed. WORKERS (2) processes test side by side; WORKERS=0 is one after another.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
cd "$ROOT"

MARK=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    MARK=()
    shift
    bash tests/packages.sh
fi
SCRATCH="$(mktemp -d)"
trap 'rm -rf "$SCRATCH"' EXIT
# No hub, no telemetry, one thread a rank: the tests start two ranks on two cores.
export HF_HUB_OFFLINE=1 HF_HOME="$SCRATCH/hf" TORCH_EXTENSIONS_DIR="$SCRATCH/extensions" DS_ACCELERATOR=cpu
export TMPDIR="$SCRATCH"

ruff check .
ruff format --check .
mypy
python -m pytest --basetemp="$SCRATCH/pytest" -n "${WORKERS:-2}" --dist loadgroup --no-loadscope-reorder \
    "${MARK[@]}" "$@"
