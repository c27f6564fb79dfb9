"""What pip installs works on its own, away from the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.synthetic import write_episode

ROOT = Path(__file__).parents[1]
PACKAGE = """
from data_utils.datasets import PickPlaceCan

class Mine(PickPlaceCan):
    name = "Mine"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed packages; the repository is not on the path of what runs there."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), "."]
    subprocess.run([*pip, *built], cwd=ROOT, check=True, capture_output=True)
    wheel = next((folder / "dist").glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{installed}:{cwd}", "APT_DATA_LOC": str(cwd / "loc.yaml")}
    return subprocess.run([sys.executable, "-P", *command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_class_of_ones_own_trains_and_plans_with_the_installed_package(installed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/robot.py").write_text(PACKAGE)
    (tmp_path / "episodes").mkdir()
    for number in range(2):
        write_episode(tmp_path / "episodes" / f"{number}.h5", number)
    (tmp_path / "loc.yaml").write_text(f"default:\n  Mine: {tmp_path / 'episodes'}\n")
    where = run(installed, tmp_path, "-c", "import apt; print(apt.__file__)").stdout
    assert where.startswith(str(installed)), where
    flags = [
        "--config",
        "debug",
        "--device",
        "cpu",
        "--name",
        "r",
        "--max_iterations",
        "1",
        "--vis_interval",
        "0",
        "--bs",
        "2",
    ]
    trained = run(installed, tmp_path, "-m", "apt.train", *flags, "--dataset_classes", "mine.robot:Mine")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "checkpoints/APT/r/ckpt_latest.pt").is_file()
    policy = ["--ckpt", "r", "--episodes", "episodes", "--steps", "2"]
    judged = run(installed, tmp_path, "-m", "apt.infer.open_loop", *policy)
    assert judged.returncode == 0 and "policy / mean motion" in judged.stdout, judged.stderr
    looked = run(installed, tmp_path, "-m", "data_utils.inspect", "episodes", "--frames", "0", "--workers", "1")
    assert looked.returncode == 0, looked.stdout
    small = ["--vlm", "blocks", "--name", "s", "--dataset_classes", "mine.robot:Mine"]
    shipped = run(installed, tmp_path, "-m", "apt.train", *flags, *small)
    assert shipped.returncode == 2 and "comes with a clone of the repository" in shipped.stderr, shipped.stderr
