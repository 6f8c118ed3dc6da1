#!/usr/bin/env bash
# What the slow tests need of the system (Debian, Ubuntu), if it is missing.  Use: bash tests/packages.sh
# sshd and pdsh for two hosts, pgrep, Slurm and munge. Installing starts no daemon; the tests start and end their own.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
MISSING=()
need() { command -v "$1" >/dev/null || MISSING+=("$2"); }
need ip iproute2
need pgrep procps
need ssh openssh-client
need sshd openssh-server
need pdsh pdsh
need munged munge
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
[ ${#MISSING[@]} -gt 0 ] || exit 0
echo "packages: installing ${MISSING[*]}"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "packages: that needs root and apt-get; install ${MISSING[*]}, or leave out --slow" >&2
    exit 1
fi
# Debian's packages start their daemons when they are installed, unless a policy forbids it.
POLICY=/usr/sbin/policy-rc.d
if [ ! -e "$POLICY" ]; then
    trap 'rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod +x "$POLICY"
fi
export DEBIAN_FRONTEND=noninteractive
LOG="$(mktemp)"
if ! { apt-get update && apt-get install -y --no-install-recommends "${MISSING[@]}"; } >"$LOG" 2>&1; then
    cat "$LOG" >&2
    rm -f "$LOG"
    exit 1
fi
rm -f "$LOG"
