"""Samplers and the loader: shares, disjoint ranks, resumption, the same samples whatever the workers."""

import collections
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.batches import samplers
from data_utils.batches.loader import build_loader
from data_utils.batches.options import LoaderOptions
from data_utils.batches.samplers import DistributedMultiplexSampler, DistributedWeightedSampler, SampleKey
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.types import Batch
from tests.data.episodes import config, tokenize, write_episode

SIZES = (40, 3, 11)
LENGTHS = [np.random.default_rng(size).integers(2, 9, size) for size in SIZES]
SAMPLERS = [
    lambda **k: DistributedWeightedSampler(SIZES, [1, 2, 1], 97, **k),
    lambda **k: DistributedMultiplexSampler(SIZES, 3, **k),
    lambda **k: DistributedWeightedSampler(SIZES, [1, 2, 1], 97, lengths=LENGTHS, **k),
    lambda **k: DistributedMultiplexSampler(SIZES, 2, lengths=LENGTHS, **k),
]
CHUNKS = [samplers.CHUNK, 10]  # the epoch in one piece, and in many


@pytest.fixture(params=CHUNKS)
def any_chunk(request, monkeypatch):
    monkeypatch.setattr(samplers, "CHUNK", request.param)
    monkeypatch.setattr(samplers, "BLOCK", request.param // 4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 10)), min_size=1, max_size=5),
    st.integers(1, 400),
    st.integers(0, 5),
)
def test_each_datasets_share_follows_its_weight_whatever_its_size(datasets, length, epoch):
    sizes, weights = zip(*datasets, strict=True)
    sampler = DistributedWeightedSampler(sizes, weights, length)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    counts = np.bincount([key.dataset for key in keys], minlength=len(sizes))
    assert np.abs(counts - np.array(weights) / sum(weights) * length).max() <= len(sizes)
    for dataset, size in enumerate(sizes):
        seen = np.bincount([key.episode for key in keys if key.dataset == dataset], minlength=size)
        assert len(seen) == size and seen.max() - seen.min() <= 1  # used up before it starts again


def test_by_frame_every_frame_of_every_episode_is_drawn_once_a_round():
    keys = list(DistributedMultiplexSampler(SIZES, 2, lengths=LENGTHS))
    counts = collections.Counter((key.dataset, key.episode, key.frame) for key in keys)
    wanted = {(d, e, f) for d, frames in enumerate(LENGTHS) for e, n in enumerate(frames) for f in range(n)}
    assert set(counts) == wanted and set(counts.values()) == {2}
    first_round = keys[: len(keys) // 2]
    assert len({key[:2] + (key.frame,) for key in first_round}) == len(first_round)


@pytest.mark.usefixtures("any_chunk")
def test_by_frame_shares_follow_the_weights_and_frames_are_used_up_in_turn():
    keys = list(DistributedWeightedSampler(SIZES, [1, 2, 1], 1200, lengths=LENGTHS))
    counts = collections.Counter(key.dataset for key in keys)
    assert counts == {0: 300, 1: 600, 2: 300}
    for dataset, frames in enumerate(LENGTHS):
        seen = collections.Counter((key.episode, key.frame) for key in keys if key.dataset == dataset)
        assert len(seen) == frames.sum() and max(seen.values()) - min(seen.values()) <= 1


def test_twenty_million_frames_need_little_memory():
    lengths = [np.full(100_000, 200, np.int32)]
    sampler = DistributedMultiplexSampler([100_000], 5, lengths=lengths, world_size=64, batch_size=64)
    tracemalloc.start()
    sampler.set_start(len(sampler) // 64 - 1)
    last = list(sampler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(last) >= 64 and peak < 400 << 20
    with pytest.raises(ValueError, match="lengths must give"):
        DistributedMultiplexSampler([3], lengths=[[2, 2]])


def test_a_weight_of_zero_leaves_a_dataset_out():
    assert {key.dataset for key in DistributedWeightedSampler(SIZES, [1, 0, 1])} == {0, 2}


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]])
def test_weights_that_make_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        DistributedWeightedSampler(SIZES, weights)


def test_multiplex_repeats_every_episode_that_often():
    counts = collections.Counter((key.dataset, key.episode) for key in DistributedMultiplexSampler(SIZES, 4))
    assert len(counts) == sum(SIZES) and set(counts.values()) == {4}


def test_a_round_of_multiplex_never_draws_an_episode_twice_on_any_ranks():
    ranks = [list(DistributedMultiplexSampler(SIZES, 2, rank=r, world_size=4)) for r in range(4)]
    first_round = [(key.dataset, key.episode) for keys in ranks for key in keys if key.draw < sum(SIZES)]
    assert len(set(first_round)) == len(first_round)


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_have_equal_length_and_share_no_draw(make, world_size):
    ranks = [list(make(rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(keys) for keys in ranks}) == 1 and len(ranks[0]) == len(make(world_size=world_size))
    draws = [key.draw for keys in ranks for key in keys]
    assert sorted(draws) == list(range(len(draws)))


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("make", SAMPLERS)
def test_ranks_together_see_what_one_rank_would(make):
    alone = {key.draw: key for key in make()}
    for rank in range(4):
        for key in make(rank=rank, world_size=4):
            assert alone[key.draw] == key


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("make", SAMPLERS)
def test_order_depends_on_seed_and_epoch_alone(make):
    def order(seed, epoch):
        sampler = make(seed=seed)
        sampler.set_epoch(epoch)
        return [key[:2] for key in sampler]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


@pytest.mark.usefixtures("any_chunk")
@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_starting_in_mid_epoch_is_continuing(make, step):
    sampler = make(rank=1, world_size=2, batch_size=4)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_start(step)
    assert list(sampler) == whole[step * 4 :]
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(whole)
    with pytest.raises(ValueError, match="outside the epoch"):
        sampler.set_start(10_000)


def test_samples_of_different_draws_epochs_and_seeds_use_different_generators():
    keys = [SampleKey(0, 0, draw, epoch) for draw in range(20) for epoch in range(20)]
    draws = [key.generator(seed).integers(2**62) for key in keys for seed in (0, 1)]
    assert len(set(draws)) == len(draws)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    big = [write_episode(folder / f"big{i}.h5", frames=6) for i in range(5)]
    small = [write_episode(folder / f"small{i}.h5", frames=6, num_arms=2) for i in range(2)]
    two_arms = config(ee_indices=(0, 1), ee_ref_cams=(("front",), ("wrist",)), aug_color=True)
    return [H5DatasetMapBase(big, config(aug_crop=True)), H5DatasetMapBase(small, two_arms)]


def loader_of(datasets, workers, **changes):
    own = {name: changes.pop(name) for name in ("rank", "world_size", "train", "num_samples") if name in changes}
    options = {"batch_size": 4, "seed": 5, "weights": (1, 1), "multiplex": 4, "persistent_workers": True, **changes}
    return build_loader(datasets, LoaderOptions(workers=workers, **options), tokenize=tokenize, pad_id=0, **own)


def fingerprint(batches):
    return [(batch.source, batch.observation.prompt, batch.observation.rgb.numpy().tobytes()) for batch in batches]


def test_batches_do_not_depend_on_workers_or_on_where_a_run_started(datasets):
    loader, sampler = loader_of(datasets, workers=0)
    sampler.set_epoch(2)
    whole = list(loader)
    assert len(whole) == len(loader) == 7 and all(isinstance(batch, Batch) for batch in whole)
    assert whole[0].observation.rgb.shape == (4, 1, 2, 3, 32, 32) and whole[0].future.shape == (4, 4, 2, 17)
    loader, sampler = loader_of(datasets, workers=2)
    list(loader)  # epoch 0, so that persistent workers are warm
    sampler.set_epoch(2)
    assert fingerprint(loader) == fingerprint(whole)
    sampler.set_start(5)
    assert fingerprint(loader) == fingerprint(whole[5:])


def test_loading_leaves_torchs_global_generator_alone(datasets):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader_of(datasets, workers=0)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_spawned_workers_give_the_same_batches(datasets):
    whole = fingerprint(loader_of(datasets, workers=0)[0])
    loader, _ = loader_of(datasets, workers=1)
    loader.options["multiprocessing_context"] = "spawn"
    assert fingerprint(loader) == whole


def test_items_of_different_workers_differ_and_repeat_with_the_seed(datasets):
    def frames(seed):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(datasets[0], batch_size=None, num_workers=2, sampler=[0] * 20)
        return [float(item["timestamps"]) for item in loader]

    first = frames(1)
    assert first == frames(1) and first != frames(2)
    assert first[0::2] != first[1::2]


def test_by_frame_an_epoch_of_batches_holds_every_frame(datasets):
    loader, _ = loader_of(datasets, workers=0, weights=None, multiplex=1, batch_size=7, sample_by="frame")
    sources = [source for batch in loader for source in batch.source]
    assert len(sources) == len(set(sources)) == 42
    with pytest.raises(ValueError, match="sample_by.*episode, frame"):
        loader_of(datasets, workers=0, sample_by="video")


def test_an_epoch_shorter_than_a_batch_is_refused(datasets):
    with pytest.raises(ValueError, match="sample_multiplex"):
        loader_of(datasets, workers=0, batch_size=100)


def test_datasets_that_cannot_share_a_batch_are_refused(datasets):
    other = H5DatasetMapBase(datasets[0].paths, config(num_future=9))
    with pytest.raises(ValueError, match="num_future"):
        loader_of([datasets[0], other], workers=0)
