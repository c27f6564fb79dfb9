"""Help of commands that need no model waits for none of its libraries."""

import subprocess
import sys

import pytest

_LOADED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", [name for name in ("torch", "transformers", "matplotlib", "mujoco") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "command",
    [
        ("apt.train",),
        ("apt.training.launch", "train"),
        ("apt.training.launch", "finetune"),
        ("apt.ablate",),
        ("apt.grounding",),
        ("apt.grounding.pairs",),
        ("apt.infer.remote_service",),
        ("data_utils.calibrate",),
        ("data_utils.convert",),
        ("data_utils.export",),
        ("examples.blocks.train",),
        ("examples.blocks.vlm",),
        ("examples.blocks.demo",),
    ],
    ids=" ".join,
)
def test_help_loads_no_library_of_models_plots_or_simulators(command):
    ran = subprocess.run([sys.executable, "-c", _LOADED, *command, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded: []"
    assert "--" in ran.stdout
