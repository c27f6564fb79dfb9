"""The commands of the documents on blocks and on the small VLM, at small sizes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALLER = {"--scenes": "500", "--episodes": "2"}
FURTHER = {"apt.grounding": ["--vision-steps", "2", "--steps", "2", "--batch", "2", "--judge-every", "2"]}

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the simulator is not installed"),
]


def commands(document: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.splitlines())
    return [line for line in lines if line and line[0] == "python"]


def smaller(command: list[str], folder: Path) -> list[str]:
    words = []
    for before, word in zip(["", *command], command, strict=False):
        of_scenes = before == "--scenes" and not word.isdigit()  # a folder, of the training
        word = word if of_scenes or before not in SMALLER else SMALLER[before]
        words.append(re.sub(r"^(data|models|results)/", f"{folder}/\\1/", word))
    return [sys.executable, *words[1:], *FURTHER.get(command[2], [])]


@pytest.mark.parametrize("document", ["docs/small_vlm.md", "examples/blocks/README.md"])
def test_every_command_runs_as_it_is_written(document, tmp_path):
    ran = 0
    for command in commands(document):
        if "CKPT" in command or "--web" in command:
            continue  # a trained policy's, which a document cannot give; a page, which has tests of its own
        done = subprocess.run(smaller(command, tmp_path), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        ran += 1
    assert ran == {"docs/small_vlm.md": 5, "examples/blocks/README.md": 4}[document]
    if document.startswith("docs"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
            path.name for path in (tmp_path / "models/blocks_vlm").iterdir()
        }
