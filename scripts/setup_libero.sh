#!/usr/bin/env bash
# Make LIBERO's environment: .venv-libero with the pinned simulator, its meshes and textures, a headless OpenGL library.
# Safe to run again: it does only what is missing. Uses an interpreter given as $PYTHON, else the newest of 3.10-3.12.
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
say() { printf '[setup_libero] %s\n' "$*"; }
ORIGIN="the folder libero/libero/assets of https://github.com/Lifelong-Robot-Learning/LIBERO"
assets="" copy=""
while [ $# -gt 0 ]; do
    case "$1" in
        --assets) [ $# -gt 1 ] || fail "--assets needs a folder"; assets="$2"; shift ;;
        --assets=*) assets="${1#*=}" ;;
        --copy) copy="yes" ;;
        -h | --help)
            echo 'usage: bash scripts/setup_libero.sh [--assets DIR [--copy]]   (PYTHON=... chooses the interpreter)'
            echo "  --assets DIR  LIBERO's meshes and textures: $ORIGIN"
            echo '  --copy        copy them into the environment; without it, they are linked to where they are'
            exit 0 ;;
        *) printf 'error: unknown argument %s; see bash scripts/setup_libero.sh --help\n' "$1" >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$assets" ]; then
    [ -d "$assets" ] || fail "--assets $assets: no such folder"
    [ -d "$assets/scenes" ] || fail "--assets $assets holds no folder 'scenes'; wanted $ORIGIN"
    assets="$(cd "$assets" && pwd)"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
# Run as root where we are root or may become it without being asked.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
may_install() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
apt_install() {
    say "installing $* (apt-get)"
    as_root apt-get update -qq >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

python=.venv-libero/bin/python
if [ ! -x "$python" ]; then
    chosen=""
    for candidate in ${PYTHON:-} python3.12 python3.11 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null && suits "$candidate"; then chosen="$candidate"; break; fi
    done
    [ -n "$chosen" ] || fail "no Python 3.10, 3.11 or 3.12 found; install one (apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.11"
    say "creating .venv-libero with $("$chosen" --version)"
    if ! "$chosen" -m venv .venv-libero 2>/dev/null; then
        rm -rf .venv-libero
        may_install || fail "$chosen cannot make virtual environments; run: apt-get install python3-venv"
        apt_install python3-venv
        "$chosen" -m venv .venv-libero
    fi
fi
suits "$python" || fail ".venv-libero holds $("$python" --version); remove it and run again with Python 3.10 to 3.12"

wanted="$(cat examples/libero/requirements-base.txt examples/libero/requirements.txt | cksum)"
if [ "$(cat .venv-libero/apt-requirements 2>/dev/null)" != "$wanted" ]; then
    say "installing packages into .venv-libero (1.4 GB; a minute or two)"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$python" -m pip install -q -r examples/libero/requirements-base.txt
    "$python" -m pip install -q --no-deps -r examples/libero/requirements.txt
    printf '%s' "$wanted" > .venv-libero/apt-requirements
fi

if [ -n "$assets" ]; then
    packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    for target in "$packages/libero/libero/assets" "$packages/liberopro/liberopro/assets"; do
        [ -L "$target" ] && rm "$target"
        [ ! -e "$target" ] || { [ -n "$copy" ] && rm -rf "$target"; } || fail "$target is a folder; remove it, or add --copy to replace it"
        if [ -n "$copy" ]; then cp -r "$assets" "$target"; else ln -s "$assets" "$target"; fi
    done
    say "assets $([ -n "$copy" ] && echo copied || echo linked) from $assets"
fi

opens_gl() { "$python" -c 'from examples.headless import select_gl; select_gl()'; }
if ! opens_gl 2>/dev/null; then
    may_install || fail "the simulator needs a headless OpenGL library; run: apt-get install libosmesa6"
    apt_install libosmesa6
    opens_gl || fail "libosmesa6 is installed but does not load; try: apt-get install libegl1 libgl1-mesa-dri, and MUJOCO_GL=egl"
fi
if "$python" -c 'from examples.libero.environment import check_assets; check_assets()' 2>/dev/null; then
    say "ready: .venv-libero, $("$python" -c 'from examples.libero.environment import versions; print(", ".join(map(" ".join, versions().items())))')"
else
    say "installed, but without LIBERO's meshes and textures; get $ORIGIN and run: bash scripts/setup_libero.sh --assets DIR"
fi
