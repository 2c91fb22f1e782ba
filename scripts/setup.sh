#!/usr/bin/env bash
# Prepares this directory: Debian packages that are missing, the virtual environment .venv with the project installed in it
# (editable), and the extension module. What is up to date is left alone, so a second run takes a moment.
#
#     scripts/setup.sh build|demo|test|fuzz
#
# Packages are installed as root or through sudo; without either, the command is printed and the script stops with 1.
# Services that come with packages (mosquitto, nginx) are neither started nor enabled.
#
# PYTHON names the interpreter the environment is made with (default: python3); RMAKER_OTA_VENV the environment (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."

need=${1:-test}
python=${PYTHON:-python3}
venv=${RMAKER_OTA_VENV:-.venv}
list=packaging/debian-packages.txt
PATH=$PATH:/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

case $need in
build | demo) extras="[cloud]" ;;
test | fuzz) extras="[cloud,test,lint]" ;;
*)
    echo "usage: scripts/setup.sh build|demo|test|fuzz" >&2
    exit 2
    ;;
esac
needs="build demo test fuzz"
needs=${needs%"$need"*}$need

say() {
    echo "setup: $*"
}

# ---- Debian packages -------------------------------------------------------------------------------------------------

have() { # have KIND WHAT: is it there?
    case $1 in
    command) command -v "$2" >/dev/null ;;
    library) command -v pkg-config >/dev/null && pkg-config --exists "$2" ;;
    python) "$python" -c "$2" 2>/dev/null ;;
    file) compgen -G "${2%% *}" >/dev/null || { [ "${2#* }" != "$2" ] && have file "${2#* }"; } ;;
    *)
        echo "$list: no such check: $1" >&2
        exit 2
        ;;
    esac
}

missing_packages() {
    local group package kind what
    local -A seen=()
    while read -r group package kind what; do
        case $group in '' | '#'*) continue ;; esac
        [[ " $needs " == *" $group "* ]] || continue
        [ -n "${seen[$package]:-}" ] || have "$kind" "$what" || {
            seen[$package]=1
            echo "$package"
        }
    done <"$list"
}

install_packages() { # install_packages PACKAGE...
    local as_root=()
    if ! command -v apt-get >/dev/null; then
        echo "setup: install what Debian calls: $*" >&2
        exit 1
    fi
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo true; }; }; then
            as_root=(sudo)
        else
            printf 'setup: Debian packages are missing; as root, run\n\n    apt-get update && apt-get install -y %s\n\n' "$*" >&2
            exit 1
        fi
    fi
    say "installing $*"
    # Debian asks policy-rc.d whether a package may start its service; where nobody has answered yet, the answer is no.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
        "${as_root[@]}" chmod 755 $policy
        # shellcheck disable=SC2064 - the values of now are wanted
        trap "${as_root[*]} rm -f $policy" EXIT
    fi
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq)
    local log
    log=$(mktemp)
    if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; } </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        echo "setup: apt-get failed; what it said is above" >&2
        exit 1
    fi
    rm -f "$log"
    if [ -d /run/systemd/system ]; then
        local service
        for service in mosquitto nginx; do
            if [[ " $* " == *" $service"* ]]; then
                "${as_root[@]}" systemctl --quiet disable --now "$service" 2>/dev/null || true
            fi
        done
    fi
    if [ -e $policy ] && [ -n "$(trap -p EXIT)" ]; then
        "${as_root[@]}" rm -f $policy
        trap - EXIT
    fi
}

if ! command -v "$python" >/dev/null; then
    install_packages python3 python3-dev python3-venv
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, $python is $("$python" -V); name another one: make PYTHON=python3.12 ..." >&2
    exit 1
}
mapfile -t missing < <(missing_packages)
if [ ${#missing[@]} -gt 0 ]; then
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "setup: installed, and still not to be found: ${missing[*]} (see the checks in $list)" >&2
        exit 1
    fi
fi

# ---- Virtual environment ---------------------------------------------------------------------------------------------

digest() { # digest of the contents of the files named on standard input
    LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum | cut -d ' ' -f 1
}

fresh() { # fresh STAMP VALUE: was this step done for this value?
    [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ]
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    say "making $venv"
    "$python" -m venv --clear "$venv"
fi

tools=("setuptools>=77" "Cython>=3.0" "cffi>=1.16")
state="$(echo pyproject.toml | digest) $(pwd)"
sources=$(find src setup.py pyproject.toml "$list" python/rmaker_ota/embed/*.* python/rmaker_ota/esp_err.py -type f | digest)
if ! fresh .stamp-dependencies "$extras $state" && ! fresh .stamp-dependencies "[cloud,test,lint] $state"; then
    say "installing Python packages and building the extension"
    "$venv/bin/python" -m pip install --quiet "${tools[@]}"
    "$venv/bin/python" -m pip install --quiet --no-build-isolation --editable ".$extras"
    echo "$extras $state" >"$venv/.stamp-dependencies"
    echo "$sources" >"$venv/.stamp-extension"
fi
if ! fresh .stamp-extension "$sources" || ! compgen -G "python/rmaker_ota/ota_core*.so" >/dev/null; then
    say "building the extension"
    "$venv/bin/python" setup.py -q build_ext --inplace
    echo "$sources" >"$venv/.stamp-extension"
fi
