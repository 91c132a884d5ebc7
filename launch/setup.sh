#!/usr/bin/env bash
# Makes .venv in the repository's root, if there is none, and installs a requirements file and this
# package into it, if that changed since the last time.
#
#     bash launch/setup.sh [requirements.txt]
#
# PYTHON           interpreter that makes .venv (default: the first on PATH that is new enough)
# TORCH_INDEX_URL  one more package index, for a CPU build of PyTorch (requirements-dev.txt alone)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}

fail() {
    echo "error: $*" >&2
    exit 2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on PATH; install one, or name it: PYTHON=/path/to/python3.11"
}

make_venv() {
    local python=$1
    echo "setup: making .venv with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear .venv
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian splits ensurepip off, but this interpreter's own pip can install into another.
        "$python" -m venv --clear --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    else
        local version
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$python has neither venv nor pip; on Debian and Ubuntu: apt install python$version-venv"
    fi
}

# A .venv whose making was interrupted has no working pip, and is made again.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    make_venv "$python"
fi
new_enough .venv/bin/python || fail ".venv holds $(.venv/bin/python --version); Python 3.11 or newer is needed: delete .venv and start again"

stamp=.venv/installed-$requirements.sha256
wanted=$(cat requirements*.txt constraints.txt pyproject.toml | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing $requirements into .venv (once; a minute or two)"
    options=(--requirement "$requirements" --constraint constraints.txt --disable-pip-version-check)
    [ -z "${TORCH_INDEX_URL:-}" ] || options+=(--extra-index-url "$TORCH_INDEX_URL")
    [ -t 1 ] || options+=(--quiet)
    .venv/bin/python -m pip install "${options[@]}" || fail "installing $requirements failed; the lines above say why"
    # Packages whose own requirements would be a burden; that file says why.
    alone=${requirements%.txt}-nodeps.txt
    [ ! -f "$alone" ] || .venv/bin/python -m pip install --quiet --no-deps --requirement "$alone" --disable-pip-version-check || fail "installing $alone failed; the lines above say why"
    # The package itself stays where it is: scripts outside it, such as the benchmarks, find it there.
    .venv/bin/python -m pip install --quiet --no-deps --editable . --disable-pip-version-check || fail "installing seed_jax failed; the lines above say why"
    echo "$wanted" >"$stamp"
fi
