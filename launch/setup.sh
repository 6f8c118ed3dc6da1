# Makes the virtual environment .venv of this checkout, or reuses it when it is current.  Use: source launch/setup.sh
# Sets ROOT (the checkout) and puts .venv/bin first on PATH. PYTHON names another interpreter than python3.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

revpatch_setup() {
    local python="${PYTHON:-python3}" stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "set-up: needs Python 3.10 or newer, found $("$python" --version 2>&1); name one: PYTHON=python3.11 bash ..." >&2
        return 1
    fi
    # Not the one of an environment that is active: it may be the one that is about to be made anew.
    python="$("$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')"
    stamp="$("$python" --version) $ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt" | sha256sum)"
    exec 9>"$ROOT/.venv.lock"
    flock 9 # two set-ups at once: the second waits and finds the environment made
    if [ "$(cat "$VENV/.revpatch" 2>/dev/null)" != "$stamp" ]; then
        echo "set-up: installing into $VENV (a few minutes, once)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || return 1
        local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$ROOT/launch/constraints.txt")
        # torch first: deepspeed's installer looks for it.
        if ! "${pip[@]}" torch setuptools || ! "${pip[@]}" -e "$ROOT[dev]"; then
            echo "set-up: pip failed, see above; nothing is marked as installed, so the same command tries again" >&2
            return 1
        fi
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 &&
            ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
            echo "set-up: this machine has an NVIDIA GPU, but the torch that pip installed can't use it; let pip find a CUDA" \
                "build of torch 2.13.0, as PyTorch's own instructions say (where it looks: pip's settings, or the" \
                "variable PIP_INDEX_URL), and run the same command again" >&2
            return 1
        fi
        echo "$stamp" >"$VENV/.revpatch"
    fi
    flock -u 9
    exec 9>&-
}

revpatch_setup || exit 1
export PATH="$VENV/bin:$PATH"
