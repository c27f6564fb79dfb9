"""The cache of frozen features: it changes the time that training takes, and nothing else."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.model.config import VLAConfig
from apt.model.experts.registry import ARCHITECTURES
from apt.model.vla import VLA
from apt.model.vlm import VLM
from apt.presets import CONFIGS
from apt.training.feature_cache import FeatureCache, sample_key, vlm_identity
from tests.model.helpers import make_batch
from tests.training.helpers import losses, start_training, train
from tests.training.test_deepspeed import needs_deepspeed
from train_utils.errors import ConfigError
from train_utils.feature_store import FeatureStore

PROMPTS = ["pick up the milk", "go", "put it down!!"]


def build(stage: int = 0, **changes) -> VLA:
    torch.manual_seed(0)
    config = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, num_future=8, train_stage=stage)
    model = VLA(dataclasses.replace(config, **changes)).train()
    with torch.no_grad():
        for parameter in model.expert.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def cache_of(tmp_path):
    """Builds caches in one folder, as one run after the other would."""

    def make(vlm: VLM) -> FeatureCache:
        return FeatureCache(vlm, FeatureStore(tmp_path / "cache", 1e8), autocast=False)

    return make


@pytest.fixture
def vlm_passes(monkeypatch) -> list[int]:
    """Samples of each pass of the VLM from here on."""
    sizes, streams = [], VLM.streams
    monkeypatch.setattr(
        VLM,
        "streams",
        lambda vlm, observation, *a: sizes.append(len(observation.input_ids)) or streams(vlm, observation, *a),
    )
    return sizes


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_cached_run_repeats_the_uncached_one_to_the_bit_and_runs_the_vlm_once_per_sample(
    tmp_path, located, vlm_passes
):
    common = {"train_stage": 0, "augment": False, "ema_enabled": True, "ema_start": 2, "max_iterations": 4}
    cached = {**common, "cache_vlm_features": tmp_path / "cache"}
    assert train(tmp_path, "plain", **common) == 0
    assert sum(vlm_passes) == 8
    vlm_passes.clear()
    assert train(tmp_path, "cold", **cached) == 0
    assert 0 < sum(vlm_passes) <= 8
    vlm_passes.clear()
    assert train(tmp_path, "warm", **cached | {"max_iterations": 2}) == 0
    assert vlm_passes == []
    assert train(tmp_path, "warm", **cached, resume=True, vis_interval=4) == 0
    assert vlm_passes == [2], "the picture's, which shows what a robot would do"
    assert losses(tmp_path, "plain") == losses(tmp_path, "cold") == losses(tmp_path, "warm")
    weights = [load_checkpoint(tmp_path / f"ckpt/{name}/ckpt_latest.pt")["weights"] for name in ("plain", "warm")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_the_same_whichever_samples_are_stored(cache_of, vlm_passes, arch, stage):
    model = build(stage, arch=arch)
    hidden = [(1, 0)]  # a sample of one camera, and so of fewer tokens
    batch = make_batch(model.vlm, PROMPTS, hidden=hidden)

    def gradients(features) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(batch, torch.Generator().manual_seed(1), features=features).total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(None)
    vlm_passes.clear()
    cache = cache_of(model.vlm)
    part = make_batch(model.vlm, PROMPTS[:2], hidden=hidden)
    cache.features(cache.look_up(part))
    cache.close()
    for missing in ([2, 1], []):  # the first of the part, then what the batch adds to it; then nothing
        cache = cache_of(model.vlm)
        cached = gradients(cache.features(cache.look_up(batch)))
        share = cache.hit_share()
        cache.close()
        assert vlm_passes == missing
        assert share == pytest.approx(2 / 3 if missing else 1)
        vlm_passes.clear()
        assert set(cached) == set(plain)
        for name, gradient in plain.items():
            torch.testing.assert_close(cached[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_batches_are_looked_up_one_ahead_and_none_is_lost(cache_of):
    model = build()
    cache, pulled = cache_of(model.vlm), []

    def loader():
        for number in range(4):
            pulled.append(number)
            yield dataclasses.replace(make_batch(model.vlm, ["go"], seed=number), source=[str(number)])

    batches = cache.ahead(loader())
    assert next(batches).source == ["0"] and pulled == [0, 1]
    assert [batch.source for batch in batches] == [["1"], ["2"], ["3"]]
    cache.close()


@needs_deepspeed
@pytest.mark.slow
def test_two_processes_share_a_cache_under_ddp_and_under_zero_2(tmp_path, data_loc):
    common = {"train_stage": 0, "augment": False, "max_iterations": 4, "log_interval": 1}
    cached = {**common, "cache_vlm_features": tmp_path / "cache"}
    sharded = {"backend": "deepspeed", "ds_zero": 2}
    runs = {"plain": common, "cold": cached, "warm": cached, "zero2": cached | sharded}
    for name, fields in runs.items():
        process = start_training(tmp_path, name, data_loc, processes=2, **fields)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert ("cache 100%" in out) == (name in ("warm", "zero2"))
    plain = losses(tmp_path, "plain")
    for name in ("cold", "warm", "zero2"):
        assert losses(tmp_path, name) == pytest.approx(plain, abs=1e-4), name


# -- what a record is known by -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, reads_prompt", [(0, False), (1, True)])
def test_a_sample_is_known_by_what_the_vlm_sees_of_it(stage, reads_prompt):
    vlm = build(stage).vlm

    def key(prompt: str = "go", change=lambda observation: None, identity: bytes = b"vlm") -> bytes:
        observation = make_batch(vlm, ["put it down!!", prompt]).observation  # padding does not count
        change(observation)
        return sample_key(identity, observation, 1)

    def set_pixel(observation):
        observation.rgb[1, -1, 0, 0, 0, 0] ^= 1

    def swap_cameras(observation):
        observation.rgb[1] = observation.rgb[1].flip(1)

    def move(observation):
        observation.world_from_cam += 1
        observation.K[:, :, 0, 2] += 1
        observation.mask[1, :, :, :8] = False
        observation.rgb[0] = 0

    assert key() == key() == key(change=move)
    assert len({key(), key(change=set_pixel), key(change=swap_cameras), key(identity=b"other")}) == 4
    assert (key("stay") != key("go")) == reads_prompt


def test_a_vlm_is_known_by_what_it_computes_not_by_its_name(tmp_path):
    config = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, num_future=8, train_stage=0)
    vlm = VLA(config).vlm
    from apt.model.encoders.hub import resolve

    moved = shutil.copytree(resolve("tiny"), tmp_path / "moved")
    same = [VLA(config).vlm, VLA(dataclasses.replace(config, vlm=str(moved))).vlm]
    assert {vlm_identity(other, False) for other in same} == {vlm_identity(vlm, False)}

    nudged = VLA(config).vlm
    with torch.no_grad():
        nudged.qwen.model.language_model.layers[0].mlp.up_proj.weight[0, :2] += torch.tensor([0.5, -0.5])
    others = [
        nudged,
        VLA(config, random_vlm=True).vlm,
        VLA(config, random_vlm=True).vlm,
        VLA(config, frozen_dtype=torch.bfloat16).vlm,
        VLA(dataclasses.replace(config, vlm_layer_stride=2)).vlm,
        VLA(dataclasses.replace(config, train_stage=1)).vlm,
        VLA(dataclasses.replace(config, arch="pi")).vlm,
        VLA(dataclasses.replace(config, arch="gr00t")).vlm,
    ]
    identities = [vlm_identity(vlm, False), vlm_identity(vlm, True), *(vlm_identity(other, False) for other in others)]
    assert len(set(identities)) == len(identities)


# -- the store ---------------------------------------------------------------------------------------------------------


def record(number: int, size: int = 30_000) -> tuple[bytes, np.ndarray]:
    return b"key %d" % number, np.full(size, number % 251, np.uint8)


def count_whole(store: FeatureStore, numbers: range) -> int:
    """Records there are; every one of them must be whole."""
    out, count = np.empty(30_000, np.uint8), 0
    for number in numbers:
        if store.read_into(record(number)[0], out):
            assert np.array_equal(out, record(number)[1])
            count += 1
    return count


def write_for_ever(folder: Path, first: int) -> None:
    store = FeatureStore(folder, 1e9)
    while True:
        store.add(map(record, range(first, first + 5)))
        first += 5


def test_processes_that_write_at_once_and_are_killed_leave_whole_records(tmp_path):
    context = multiprocessing.get_context("fork")
    folder, kept = tmp_path / "cache", 0
    for attempt in range(5):
        writers = [context.Process(target=write_for_ever, args=(folder, 100_000 * (2 * attempt + k))) for k in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.15 + 0.03 * attempt)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        store = FeatureStore(folder, 1e9)
        found = len(store)
        assert found > kept and found % 5 == 0, "a transaction is whole or absent"
        for k in range(2):
            first = 100_000 * (2 * attempt + k)
            count_whole(store, range(first, first + found))
        kept = found
        store.close()


def test_a_store_stops_at_its_limit_and_keeps_what_it_has(tmp_path):
    store = FeatureStore(tmp_path, limit=1e6)
    for number in range(0, 100, 10):
        store.add(map(record, range(number, number + 10)))
    assert store.is_full
    kept = count_whole(store, range(100))
    assert kept == len(store) > 25
    assert 0.9e6 < (tmp_path / "data.mdb").stat().st_size <= 1e6
    store.close()

    larger = FeatureStore(tmp_path, limit=2e6)  # a later run may raise the limit
    larger.add([record(1000)])
    assert not larger.is_full and len(larger) == kept + 1
    larger.close()


def test_a_full_cache_goes_on_training_and_says_so(tmp_path, located, capsys):
    fields = {"train_stage": 0, "augment": False, "cache_vlm_features": tmp_path / "cache", "cache_limit_gb": 2e-4}
    assert train(tmp_path, "run", max_iterations=4, **fields) == 0
    assert "(full)" in capsys.readouterr().out.splitlines()[-2]


def test_a_record_of_another_size_and_a_damaged_file_are_one_clear_error(tmp_path):
    store = FeatureStore(tmp_path / "good", 1e6)
    store.add([record(1)])
    with pytest.raises(ConfigError, match="record of 30000 bytes where 10 belong; remove the folder"):
        store.read_into(record(1)[0], np.empty(10, np.uint8))
    store.close()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="cannot be opened .*remove a damaged one"):
        FeatureStore(tmp_path / "bad", 1e6)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable folder"):
        FeatureStore(tmp_path / "file", 1e6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"augment": True}, "PickPlaceCan augments them at random; give --augment False"),
        ({"camera_view_dropout": 0.1}, "camera_view_dropout is 0.1, not 0"),
        ({"vlm_finetune_mode": "lora"}, "vlm_finetune_mode is 'lora', not frozen"),
        ({"vlm_finetune_mode": "full"}, "vlm_finetune_mode is 'full', not frozen"),
        ({"backend": "deepspeed", "ds_zero": 3}, "does not work with ds_zero 3"),
        ({"cache_limit_gb": 0.0}, "cache_limit_gb is 0.0; it must be positive"),
    ],
)
def test_what_a_cache_would_make_wrong_is_refused(changes, message):
    good = dataclasses.replace(CONFIGS["debug"], augment=False, cache_vlm_features="cache")
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(good, **changes)
