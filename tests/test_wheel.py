"""What pip installs works on its own, away from the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.synthetic import write_episode
from tests.transport.conftest import free_port, running_name_server

ROOT = Path(__file__).parents[1]
PACKAGE = """
from data_utils.datasets import PickPlaceCan

class Mine(PickPlaceCan):
    name = "Mine"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment of its own, into which pip has installed the wheel; what it needs comes from this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), "."]
    subprocess.run([*pip, *built], cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    site = Path(next((folder / "env/lib").glob("python*/site-packages")))
    wheel = next((folder / "dist").glob("*.whl"))
    python = ["--python", str(folder / "env/bin/python")]
    subprocess.run([*pip, *python, "install", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env"


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    """A program of the environment, away from the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(cwd), "APT_DATA_LOC": str(cwd / "loc.yaml"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder with a class of one's own and two episodes."""
    tmp_path = tmp_path_factory.mktemp("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/robot.py").write_text(PACKAGE)
    (tmp_path / "episodes").mkdir()
    for number in range(2):
        write_episode(tmp_path / "episodes" / f"{number}.h5", number)
    (tmp_path / "loc.yaml").write_text(f"default:\n  Mine: {tmp_path / 'episodes'}\n")
    return tmp_path


@pytest.fixture(scope="module")
def prior(installed, mine) -> str:
    """A VA prior's name."""
    trained = run(installed, mine, "apt-vla", "train", *DEBUG, *OWN, "--stage", "0", "--va-name", "prior")
    assert trained.returncode == 0, trained.stderr
    return "prior"


OWN = ("--dataset_classes", "mine.robot:Mine")
DEBUG = "--config debug --gpus cpu --device cpu --max-iter 1 --vis_interval 0 --bs 2".split()


@pytest.mark.slow
def test_the_command_trains_plans_looks_and_converts_away_from_the_repository(installed, mine, prior):
    where = run(installed, mine, "python", "-c", "import apt; print(apt.__file__)").stdout
    assert where.startswith(str(installed)), where
    start = ("--pretrained-ckpt", prior, "--vla-name", "r")
    tuned = run(installed, mine, "apt-vla", "finetune", *DEBUG, *OWN, *start)
    assert tuned.returncode == 0, tuned.stderr
    assert (mine / "checkpoints/APT/r/ckpt_latest.pt").is_file()
    policy = ["--ckpt", "r", "--episodes", "episodes", "--steps", "2"]
    judged = run(installed, mine, "apt-vla", "open-loop", *policy)
    assert judged.returncode == 0 and "policy / mean motion" in judged.stdout, judged.stderr
    looked = run(installed, mine, "apt-vla", "inspect", "episodes", "--frames", "0", "--workers", "1")
    assert looked.returncode == 0, looked.stdout
    exported = run(installed, mine, "apt-vla", "export", "--src", "episodes", "--out", "lerobot")
    assert exported.returncode == 0, exported.stderr
    converted = run(installed, mine, "apt-vla", "convert", "lerobot", "--src", "lerobot", "--out", "again")
    assert converted.returncode == 0 and len(list((mine / "again").rglob("*.h*5"))) == 2, converted.stderr
    folder = run(installed, mine, "apt-vla", "checkpoint", "export", "checkpoints/APT/r/ckpt_latest.pt", "r_folder")
    assert folder.returncode == 0 and (mine / "r_folder/README.md").is_file(), folder.stderr


@pytest.mark.slow
def test_a_service_of_the_installed_package_answers_and_says_its_status(installed, mine, prior):
    port = free_port()
    with running_name_server(port):
        command = [installed / "bin/apt-vla", "serve", "--ckpt", prior, "--uri", "wheel", "--ns-port", str(port)]
        service = subprocess.Popen(
            [*map(str, command), "--steps", "2"],
            cwd=mine,
            env={**os.environ, "PYTHONPATH": str(mine), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said = ""
            while "answers with" not in said:
                line = service.stdout.readline()
                assert line, said
                said += line
            status = run(installed, mine, "apt-vla", "status", "--uri", "wheel", "--ns-port", str(port))
            assert status.returncode == 0 and "prior/ckpt_latest.pt" in status.stdout, status.stderr
        finally:
            service.terminate()
            assert service.wait(30) == 0


@pytest.mark.slow
def test_mistakes_are_one_line_and_the_usage_is_of_the_installed_command(installed, mine):
    asked = run(installed, mine, "apt-vla", "train", *DEBUG, *OWN, "--stage", "1", "--va-name", "nothing")
    assert asked.returncode == 2 and "no checkpoint at" in asked.stderr, asked.stderr
    usage = run(installed, mine, "apt-vla", "train", "--help").stdout
    assert usage.startswith("usage: apt-vla train ")


@pytest.mark.slow
def test_what_a_clone_alone_has_is_said_to_be_there(installed, mine):
    demo = run(installed, mine, "apt-vla", "demo")
    assert demo.returncode == 2
    assert (
        demo.stderr
        == "error: examples.blocks.demo comes with a clone of the repository, not with the installed package\n"
    )
    shipped = run(
        installed, mine, "apt-vla", "train", *DEBUG, "--vlm", "blocks", "--dataset_classes", "mine.robot:Mine"
    )
    assert shipped.returncode == 2 and "comes with a clone of the repository" in shipped.stderr, shipped.stderr


@pytest.mark.slow
def test_the_wheel_is_typed_has_its_data_and_nothing_that_clashes(installed):
    site = next((installed / "lib").glob("python*/site-packages"))
    ours = {path.name for path in site.iterdir() if (path / "__init__.py").is_file()}
    assert ours >= {"apt", "data_utils", "train_utils", "infer_utils", "shm_transport"}
    assert not {"examples", "tests", "benchmarks", "scripts"} & ours
    assert all((site / name / "py.typed").is_file() for name in ("apt", "data_utils", "train_utils", "shm_transport"))
    for path in ROOT.glob("apt/**/*.yaml"), ROOT.glob("data_utils/**/*.yaml"), ROOT.glob("train_utils/*.json"):
        for file in path:
            if not file.name.endswith(".local.yaml"):
                assert (site / file.relative_to(ROOT)).is_file(), file


@pytest.mark.slow
def test_another_package_of_the_name_apt_is_named(installed, tmp_path):
    (tmp_path / "apt").mkdir()
    (tmp_path / "apt/__init__.py").write_text("import apt_pkg")
    done = run(installed, tmp_path, "apt-vla", "train", "--help")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"error: Python finds another package apt ({tmp_path / 'apt'}; Debian's python3-apt" in done.stderr


@pytest.mark.slow
def test_a_shell_completes_the_commands(installed, mine):
    script = run(installed, mine, "apt-vla", "--print-completion", "bash")
    assert script.returncode == 0 and "open-loop" in script.stdout, script.stderr
    completed = subprocess.run(
        [
            "bash",
            "-c",
            f"{script.stdout}\nCOMP_WORDS=(apt-vla op); COMP_CWORD=1; _shtab_apt_vla; echo ${{COMPREPLY[*]}}",
        ],
        capture_output=True,
        text=True,
    )
    assert completed.stdout.strip() == "open-loop", completed.stderr
