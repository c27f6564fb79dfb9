"""The client in a robot's environment: numpy and Pyro4 alone, an older Python, the folder merely copied."""

from __future__ import annotations

import ast
import shutil

import pytest

from tests.transport.conftest import ROOT, running

FILES = sorted((ROOT / "shm_transport").glob("*.py"))

# Whatever is not the standard library, numpy, or Pyro4 with what it needs cannot be imported here.
ROBOT = """
import sys
allowed = {"numpy", "Pyro4", "serpent", "shm_transport"}
class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        known = getattr(sys, "stdlib_module_names", None)
        if known is not None and top not in known and top not in allowed and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, OnlyThese())
import numpy as np
import shm_transport, shm_transport.check
assert shm_transport.__file__.startswith(sys.argv[2]), shm_transport.__file__
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch can be imported here")
with shm_transport.get_shm_proxy(sys.argv[1]) as robot:
    frame = {"cam": {"color": np.full((480, 640, 3), 7, np.uint8)}, "timestamp": 0.5}
    got = robot.echo(frame)
    assert got["cam"]["color"].sum() == 7 * 480 * 640 * 3 and got["timestamp"] == 0.5
    try:
        robot.fail("ValueError")
    except ValueError as error:
        assert isinstance(error, shm_transport.RemoteError)
print(sys.version_info[:2], "torch" in sys.modules)
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_python_3_8(path):
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_the_copied_folder_is_a_whole_client_without_torch(service, tmp_path):
    shutil.copytree(ROOT / "shm_transport", tmp_path / "shm_transport", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / "robot.py"
    script.write_text(ROBOT)
    with running(str(script), service.uri, str(tmp_path), env={"PYTHONPATH": ""}) as robot:
        said = robot.popen.communicate(timeout=60)[0]
        assert robot.popen.returncode == 0 and said.endswith("False\n"), said


def test_the_client_does_not_import_the_server():
    with running("-c", "import sys, shm_transport; print('shm_transport.server' in sys.modules)") as process:
        assert process.line() == "False"
