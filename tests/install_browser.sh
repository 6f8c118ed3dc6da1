#!/usr/bin/env bash
# Installs Debian's chromium where there is no browser yet.  Use: bash tests/install_browser.sh
# Called by the fixture `browser` of the slow tests; needs root or sudo, and says so.
set -euo pipefail
command -v chromium >/dev/null && exit 0
SUDO=()
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "install_browser: chromium is missing and this user can't install it: apt-get install chromium" >&2
        exit 1
    fi
    SUDO=(sudo -n)
fi
# Others may be installing too: wait for their lock.
APT=("${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300)
"${APT[@]}" update
"${APT[@]}" install -y --no-install-recommends chromium fonts-dejavu-core
