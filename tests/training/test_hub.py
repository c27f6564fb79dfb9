"""Policies on the Hub: pushed from a folder, taken wherever a checkpoint is. A stand-in plays the Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from apt.checkpoint import checkpoint_sha256, find_checkpoint, load_checkpoint, main, read_config
from apt.hub import HubError, _fetch, located
from apt.infer.loading import load_policy
from tests.hub_stand_in import Repository, StandIn
from tests.training.helpers import short_run

ROOT = Path(__file__).resolve().parents[2]
NAME = "lab/reach"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_loc):
    """A short run with a tuned VLM and an average, exported."""
    place = tmp_path_factory.mktemp("run")
    assert main(["export", str(short_run(place, data_loc)), str(place / "reach"), "--license", "mit"]) == 0
    return place / "reach"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stand_in = StandIn()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as all other tests have it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.chdir(tmp_path)
    _fetch.cache_clear()
    yield stand_in
    _fetch.cache_clear()
    stand_in.close()


@pytest.fixture
def pushed(hub, folder):
    assert main(["push", str(folder), NAME]) == 0
    return hub


def weights(place) -> dict[str, torch.Tensor]:
    return load_checkpoint(place)["weights"]


def test_what_is_pushed_is_taken_wherever_a_checkpoint_is(pushed, folder, capsys):
    assert not pushed.repositories[NAME].private
    ours, theirs = weights(folder), weights(NAME)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_config(NAME) == read_config(folder)
    model, config = load_policy(NAME, use_ema=True)
    assert config.name == "run" and not model.training
    assert load_checkpoint(find_checkpoint(NAME, "nowhere"))["current_iters"] == 2
    assert len(checkpoint_sha256(Path(NAME))) == 64


def test_the_card_says_what_people_ask_and_its_commands_name_the_repository(pushed):
    card = next(iter(pushed.repositories[NAME].commits.values()))["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n") and "pipeline_tag: robotics" in card
    assert (
        "| PickPlaceCan |" in card and "eih_cam (wrist)" in card and "a time step apart" in card
    )  # what it wants to be shown
    assert "Loss in training: " in card
    assert "path/of/this/folder" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    shell = re.search(r"```bash\n(.*?)```", card, re.DOTALL)[1]
    assert f'TrajPlanner("{NAME}", use_ema=True)' in code and f"--ckpt {NAME} " in shell
    names: dict = {}
    exec(code, names)  # as pasted
    assert names["planner"].train_config.name == "run"


def test_a_revision_stays_what_it_was_when_more_is_pushed(pushed, folder, tmp_path):
    repository = pushed.repositories[NAME]
    first = next(iter(repository.commits))
    repository.tags["v1"] = first
    state = json.loads((folder / "state.json").read_text()) | {"current_iters": 7}
    second = repository.commit({"state.json": json.dumps(state).encode()})
    assert first != second
    assert load_checkpoint(f"{NAME}@v1")["current_iters"] == 2
    assert load_checkpoint(f"{NAME}@{first}")["current_iters"] == 2
    assert load_checkpoint(NAME)["current_iters"] == 7


def test_one_process_sees_one_state_of_a_repository(pushed):
    assert read_config(NAME)["name"] == "run"
    asked = pushed.requests
    pushed.repositories[NAME].commit({"config.json": b"{}"})
    assert read_config(NAME)["name"] == "run" and pushed.requests == asked


def test_what_is_on_this_machine_comes_first(pushed, folder, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / NAME).symlink_to(folder)
    asked = pushed.requests
    assert located(NAME) == Path(NAME) and find_checkpoint(NAME, "nowhere") == Path(NAME)
    assert pushed.requests == asked


def test_paths_that_are_not_there_are_no_repositories(hub):
    for text in ("runs/a/ckpt_latest.pt", "a/ckpt_latest.pt", "/a/b", "./a/b", "../a/b", "a", "a/b/c", "a/b@"):
        assert located(text) == Path(text)
    assert hub.requests == 0


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (None, "lab/nothing", "there is no lab/nothing here .* nor on the Hub; if it is private, log in"),
        (Repository, "lab/reach@v9", "lab/reach@v9: the Hub has the repository and no such revision"),
        (Repository, "lab/reach", "the Hub's lab/reach holds no policy of this library"),
        (lambda: Repository(gated=True), "lab/reach", "lab/reach is gated: ask for access"),
    ],
)
def test_repositories_that_cannot_be_read_are_one_line(hub, make, name, says):
    if make is not None:
        hub.repositories[NAME] = make()
        hub.repositories[NAME].commit({"config.json": b"{}", "README.md": b"something else"})
    with pytest.raises(HubError, match=f"^{says}") as refused:
        located(name)
    assert "\n" not in str(refused.value)


def test_a_dead_network_is_said_at_once_and_what_is_cached_still_loads(pushed):
    assert located(NAME).is_dir()
    pushed.close()
    _fetch.cache_clear()
    assert load_checkpoint(NAME)["current_iters"] == 2
    with pytest.raises(HubError, match=r"^there is no lab/other here \(.*cache\), and the Hub cannot be reached$"):
        located("lab/other")


def command(hub: StandIn, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_of_nobody"}
    variables["HF_HUB_OFFLINE"] = "0"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables, **environment},
        capture_output=True,
        text=True,
    )


def test_the_commands_push_and_fit_from_the_hub_and_offline_from_the_cache(hub, folder, tmp_path):
    done = command(hub, tmp_path, "-m", "apt.checkpoint", "push", str(folder), NAME, "--private")
    assert done.returncode == 0 and f"pushed {folder} to {hub.url}/{NAME}\n" == done.stdout, done.stderr
    assert hub.repositories[NAME].private
    fits = (str(ROOT / "scripts/test_ckpt.py"), "--ckpt", NAME, "--train-stage", "1")
    assert command(hub, tmp_path, *fits).stdout.endswith("fits\n")
    hub.close()
    assert command(hub, tmp_path, *fits, HF_HUB_OFFLINE="1").stdout.endswith("fits\n")


def test_what_nobody_else_could_use_is_not_pushed(hub, folder, tmp_path, capsys):
    def refused(place: Path, *flags: str, to: str = NAME) -> str:
        assert main(["push", str(place), to, *flags]) == 2 and not hub.repositories
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    def copy(name: str, **changes: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        for file in folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        for file, text in changes.items():
            (place / file.replace("_", ".")).write_text(text)
        return place

    config = json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    assert "is no exported checkpoint" in refused(tmp_path)
    assert "'just_a_name' is no repository's name; wanted org/name" in refused(folder, to="just_a_name")
    assert "is no repository's name" in refused(folder, to=f"{NAME}@v2")
    assert "add --license" in refused(copy("unlicensed", README_md=card.replace("license: mit\n", "")))
    assert "says license: mit" in refused(folder, "--license", "apache-2.0")
    local = copy("local", config_json=json.dumps(config | {"vlm": "/data/Qwen3-VL-2B"}))
    assert "its VLM is /data/Qwen3-VL-2B, a folder of this machine" in refused(local)
    hub.close()
    assert "the Hub cannot be reached" in refused(folder)
