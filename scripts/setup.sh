#!/usr/bin/env bash
# Make the repository's environment: .venv with the pinned packages and the simulator, and a headless OpenGL library.
# Safe to run again: it does only what is missing. Uses an interpreter given as $PYTHON, else the newest of 3.10-3.12.
set -euo pipefail
torchcodec=""
deepspeed=""
browser=""
for argument in "$@"; do
    case "$argument" in
        --torchcodec) torchcodec="yes" ;;
        --deepspeed) deepspeed="yes" ;;
        --browser) browser="yes" ;;
        -h | --help)
            echo 'usage: bash scripts/setup.sh [--torchcodec] [--deepspeed] [--browser]   (PYTHON=... chooses the interpreter)'
            echo '  --torchcodec  also install the video reader torchcodec and the FFmpeg libraries it needs (apt-get)'
            echo '  --deepspeed   also install DeepSpeed, for scripts/train.sh --backend deepspeed'
            echo '  --browser     also install Chromium and its driver (apt-get), for the tests of pages; without it they skip'
            exit 0 ;;
        *) printf 'error: unknown argument %s; see bash scripts/setup.sh --help\n' "$argument" >&2; exit 2 ;;
    esac
done
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
# Run as root where we are root or may become it without being asked.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
may_install() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
apt_install() {
    say "installing $* (apt-get)"
    as_root apt-get update -qq >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ ! -x .venv/bin/python ]; then
    chosen=""
    for candidate in ${PYTHON:-} python3.12 python3.11 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null && suits "$candidate"; then chosen="$candidate"; break; fi
    done
    [ -n "$chosen" ] || fail "no Python 3.10, 3.11 or 3.12 found; install one (apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.11"
    say "creating .venv with $("$chosen" --version)"
    if ! "$chosen" -m venv .venv 2>/dev/null; then
        rm -rf .venv
        may_install || fail "$chosen cannot make virtual environments; run: apt-get install python3-venv"
        apt_install python3-venv
        "$chosen" -m venv .venv
    fi
fi
suits .venv/bin/python || fail ".venv holds $(.venv/bin/python --version); remove it and run again with Python 3.10 to 3.12"

wanted="$(cat requirements.txt examples/pickplace/requirements.txt | cksum)"
if [ "$(cat .venv/apt-requirements 2>/dev/null)" != "$wanted" ]; then
    say "installing packages into .venv (about 2 GB; a minute or two)"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    .venv/bin/python -m pip install -q -r requirements.txt
    .venv/bin/python -m pip install -q --no-deps -r examples/pickplace/requirements.txt
    printf '%s' "$wanted" > .venv/apt-requirements
fi

if ! .venv/bin/python -c 'from examples.headless import select_gl; select_gl()' 2>/dev/null; then
    may_install || fail "the simulator needs a headless OpenGL library; run: apt-get install libosmesa6"
    apt_install libosmesa6
    .venv/bin/python -c 'from examples.headless import select_gl; select_gl()' ||
        fail "libosmesa6 is installed but does not load; try: apt-get install libegl1 libgl1-mesa-dri, and MUJOCO_GL=egl"
fi
if [ -n "$torchcodec" ]; then
    loads() { .venv/bin/python -c 'import torchcodec.decoders' 2>/dev/null; }
    if ! .venv/bin/python -m pip show -q torchcodec 2>/dev/null; then
        say "installing torchcodec into .venv"
        .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps torchcodec==0.13.0
    fi
    if ! loads; then
        may_install || fail "torchcodec needs FFmpeg's shared libraries; run: apt-get install ffmpeg"
        apt_install ffmpeg
        loads || fail "torchcodec does not load; see .venv/bin/python -c 'import torchcodec.decoders'"
    fi
fi
if [ -n "$deepspeed" ] && ! .venv/bin/python -m pip show -q deepspeed 2>/dev/null; then
    say "installing deepspeed into .venv"
    # Its fused kernels are compiled when first used; nothing here needs them.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install -q --disable-pip-version-check deepspeed==0.19.8
fi
if [ -n "$browser" ] && ! { command -v chromium && command -v chromedriver; } >/dev/null; then
    may_install || fail "the tests of pages need Chromium; run: apt-get install chromium chromium-driver"
    apt_install chromium chromium-driver
fi
say "ready: .venv, torch $(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')"
