"""The house keeps its floors: ``[tool.importlinter]`` in pyproject.toml says which (README has the picture)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWER = ("apt", "data_utils", "train_utils", "infer_utils", "shm_transport")
BY_NAME = {
    "data_utils/convert/__main__.py",
    "apt/ablation/evaluation.py",
    "apt/ablation/worlds.py",
    "apt/cli.py",
    "apt/infer/doctor.py",
}
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def lint(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, capture_output=True, text=True)


def test_every_import_goes_down():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in (*LOWER, "examples"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_that_go_up_are_named_also_from_inside_functions(copy):
    """One run over several faults: a lazy import upwards, torch below its line, a circle, a file with no floor."""
    seeded = {
        "train_utils/ema.py": "\n\ndef _seeded():\n    from apt.configs import TrainConfig\n",
        "data_utils/checks/visibility.py": "\n\ndef _seeded():\n    import torch\n",
        "shm_transport/names.py": "\n\ndef _seeded():\n    import h5py\n",
        "examples/disturbance.py": "\n\ndef _seeded():\n    import examples.pickplace.env\n",
        "apt/model/homeless.py": '"""Says nowhere where it lives."""\n',
    }
    for name, text in seeded.items():
        with open(copy / name, "a", encoding="utf-8") as file:
            file.write(text)
    done = lint(copy)
    said = done.stdout
    assert done.returncode == 1, done.stderr
    assert "train_utils.ema -> apt.configs" in said
    assert "data_utils.checks.visibility -> torch" in said
    assert "shm_transport.names -> h5py" in said
    assert "apt.model.homeless" in said
    assert ".disturbance -> .pickplace" in said  # "no circles" speaks of siblings


def test_examples_are_named_in_five_places_alone():
    files = (path for package in LOWER for path in (ROOT / package).rglob("*.py"))
    named = {path.relative_to(ROOT).as_posix() for path in files if '"examples.' in path.read_text(encoding="utf-8")}
    assert named == BY_NAME


def test_packages_import_no_script_benchmark_or_test():
    """What lies beside the packages is on no floor, so the contracts do not see it."""
    others = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))} - {*LOWER, "examples"}
    found = re.compile(rf"^\s*(?:from|import) ({'|'.join(sorted(others))})\b", re.MULTILINE)
    assert {"benchmarks", "scripts", "tests"} <= others
    for package in (*LOWER, "examples"):
        for path in (ROOT / package).rglob("*.py"):
            assert not found.search(path.read_text(encoding="utf-8")), path


def test_what_is_imported_from_another_file_is_there_also_from_inside_functions():
    """An import inside a function is run by few tests, and some need a simulator."""
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for name in (*LOWER, "examples")
        for path in (ROOT / name).rglob("*.py")
    }
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.module} has no {alias.name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in (*LOWER, "examples")
        for alias in node.names
        if not _is_there(node.module, alias.name, trees)
    ]
    assert missing == []


def _is_there(module: str, name: str, trees: dict[Path, ast.Module]) -> bool:
    folder = ROOT.joinpath(*module.split("."))
    if (folder / name).is_dir() or (folder / f"{name}.py").is_file():
        return True
    tree = trees[folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")]
    bound = (
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Name, ast.alias, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    )
    return any(
        name == (node.id if isinstance(node, ast.Name) else getattr(node, "asname", None) or node.name)
        for node in bound
    )
