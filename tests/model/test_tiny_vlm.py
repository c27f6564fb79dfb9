"""The tiny VLM that is built on first use."""

import torch.distributed as dist
from safetensors import safe_open
from torch.testing._internal.distributed.fake_pg import FakeStore

from apt.model.encoders.tiny import tiny_qwen3vl_folder


def test_a_rank_that_is_not_the_first_builds_the_tiny_vlm_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "ours"))
    wanted = tiny_qwen3vl_folder()
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "of rank 1"))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        built = tiny_qwen3vl_folder()
    finally:
        dist.destroy_process_group()
    assert sorted(file.name for file in built.iterdir()) == sorted(file.name for file in wanted.iterdir())
    with safe_open(built / "model.safetensors", "pt") as ours, safe_open(wanted / "model.safetensors", "pt") as theirs:
        assert list(ours.keys()) == list(theirs.keys())
    assert (built / "config.json").read_bytes() == (wanted / "config.json").read_bytes()
    assert [folder.name for folder in built.parent.iterdir()] == [built.name]
