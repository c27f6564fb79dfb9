"""openpi's own client, in an environment of its own, is served as its programs expect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.infer.helpers import frame_at
from tests.service.openpi.conftest import PROMPT

pytestmark = pytest.mark.slow
CLIENT = ("openpi-client==0.1.2", "numpy<2", "typing_extensions")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Of an environment with the real client, which wants another numpy than this library."""
    folder = tmp_path_factory.mktemp("openpi") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *CLIENT]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"openpi-client cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


def flat(value: dict, above: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            found |= flat(inner, f"{above}{name}/")
        elif inner is not None:
            found[f"{above}{name}"] = np.asarray(inner)
    return found


def test_the_real_client_gets_metadata_chunks_and_errors_and_goes_on_after_them(
    service, python, local, dataset, tmp_path
):
    frame = frame_at(dataset, 0, 4)
    np.savez(tmp_path / "frame.npz", **flat({**frame, "prompt": PROMPT}))
    host, port = service.url.removeprefix("ws://").split(":")
    script = Path(__file__).with_name("real_client.py")
    done = subprocess.run(
        [python, script, host, port, tmp_path / "frame.npz"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["numpy"].startswith("1.") and {"contract", "checkpoint", "actions"} <= set(told["metadata"])
    plan = local.run_inference(frame, PROMPT)
    positions = np.array(told["chunk"])[:, :3]
    np.testing.assert_allclose(positions, plan.poses[0][:, 0, :3, 3], atol=1e-5)
    assert told["broker"] == [[7]] * 9, "one row per step"
    assert told["asked"] == 3, "nine steps, four of each chunk"
    assert "wanted openness from 0" in told["error"] and told["after_error"] == 7
    assert told["second_s"] < 30
