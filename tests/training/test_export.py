"""Checkpoints as folders for the Hub: the same tensors, readable wherever a .pt is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, main, read_config
from apt.infer.loading import load_policy
from tests.training.helpers import short_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_loc):
    """A short run with an average and a tuned VLM; its ckpt_latest.pt."""
    return short_run(tmp_path_factory.mktemp("run"), data_loc)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_a_checkpoint_comes_back_from_its_folder_as_it_was(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "hub")]) == 0
    assert main(["import", str(tmp_path / "hub"), str(tmp_path / "back" / "ckpt_latest.pt")]) == 0
    before, after = load_checkpoint(run), load_checkpoint(tmp_path / "back" / "ckpt_latest.pt")
    assert_same(before["weights"], after["weights"])
    assert_same(before["vlm_weights"], after["vlm_weights"])
    assert all(map(torch.equal, before["ema"]["shadow_params"], after["ema"]["shadow_params"]))
    assert after["current_iters"] == 2 and after["ema"]["decay"] == before["ema"]["decay"]
    assert read_config(run) == read_config(tmp_path / "back" / "ckpt_latest.pt")


def test_a_policy_loads_from_the_folder_alone(run, tmp_path):
    main(["export", str(run), str(tmp_path / "hub")])
    for use_ema in (False, True):
        (ours, config), (theirs, _) = load_policy(run, use_ema=use_ema), load_policy(tmp_path / "hub", use_ema=use_ema)
        assert_same(ours.released_weights(), theirs.released_weights())
        assert_same(ours.released_vlm_weights(), theirs.released_vlm_weights())
        assert config.name == "run"
    assert find_checkpoint(str(tmp_path / "hub"), "nowhere") == tmp_path / "hub"


def test_the_folder_is_what_the_hub_takes(run, tmp_path):
    main(["export", str(run), str(tmp_path / "hub")])
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    wanted = {"action_expert.safetensors", "vlm.safetensors", "ema.safetensors", "config.json", "state.json"}
    assert files == wanted | {"README.md"}
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "hub").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1, "they are as readable as any file"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: apt-vla") and "LoRA" in card and "2 iterations on PickPlaceCan" in card
    assert "objective `ddim`, prediction `sample`, action_scale `0.1 0.3 1`, action_step_embedding `True`" in card
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["vlm_finetune_mode"] == "lora"


def test_an_export_never_overwrites_and_a_damaged_folder_is_named(run, tmp_path, capsys):
    main(["export", str(run), str(tmp_path / "hub")])
    assert main(["export", str(run), str(tmp_path / "hub")]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    expert = tmp_path / "hub" / "action_expert.safetensors"
    expert.write_bytes(expert.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"action_expert\.safetensors is not a readable safetensors file"):
        load_checkpoint(tmp_path / "hub")
    assert main(["import", str(tmp_path), str(tmp_path / "x.pt")]) == 2
    assert "no exported checkpoint" in capsys.readouterr().err and not (tmp_path / "x.pt").exists()


def test_the_command_explains_itself():
    result = subprocess.run(
        [sys.executable, "-m", "apt.checkpoint", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "export" in result.stdout and "import" in result.stdout
