"""What a frozen VLM answers, kept on disk: a sample that comes again is read instead of computed.

A record holds what the expert reads of the VLM, of the tokens that the expert gets, in the type it was computed in. Its
key is a hash of the VLM, of the prompt's tokens and of the pixels of the shown cameras in their order. Whatever depends
on poses, intrinsics and masks is computed anew (:meth:`VLM.features`).

The records of a batch are looked up while the batch before it trains, and new ones are written behind the training's
back. Nothing here waits for the device but the thread that writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import transformers

from apt.model.experts.base import VLMFeatures
from apt.model.vlm import VLM
from data_utils.types import Batch, Observation, StoredStreams
from train_utils.feature_store import FeatureStore

_VERSION = 2  # part of every key: raise when this project's code computes other features from the same input
_UNWRITTEN = 2  # batches that may wait for the disk before training does


class FeatureCache:
    """Features of batches, from disk where they are there, else from the VLM.

    Args:
        vlm: frozen, in its place and type; it must not change afterwards.
        store: where the records are.
        autocast: whether the VLM is run under bfloat16 autocast.
        threads: that hash images and read records.
    """

    def __init__(self, vlm: VLM, store: FeatureStore, autocast: bool, threads: int = 4) -> None:
        self._vlm, self._store = vlm, store
        self._identity = vlm_identity(vlm, autocast)
        embedding = vlm.qwen.get_input_embeddings().weight
        self._dtype, self._device = embedding.dtype, embedding.device
        self._ahead = ThreadPoolExecutor(1, "cache-ahead")
        self._readers = ThreadPoolExecutor(threads, "cache-read")
        self._writer = ThreadPoolExecutor(1, "cache-write")
        self._unwritten: deque[Future] = deque()
        self._found, self._asked = 0, 0

    def __str__(self) -> str:
        store = self._store
        full = "; it is full: nothing more is added" if store.is_full else ""
        return (
            f"feature cache {store.folder}: {len(store)} samples, {store.num_bytes / 1e9:.3g} of "
            f"{store.limit / 1e9:.3g} GB{full}"
        )

    @property
    def is_full(self) -> bool:
        return self._store.is_full

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches with what is stored of them, each looked up while the one before it is worked on."""
        waiting: Future[Batch] | None = None
        for batch in batches:
            looked_up = self._ahead.submit(self.look_up, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = looked_up
        if waiting is not None:
            yield waiting.result()

    def look_up(self, batch: Batch) -> Batch:
        """The batch (on the CPU, as it comes from the loader) with what is stored of it."""
        observation = batch.observation
        tokens = self._vlm.expert_tokens(observation.input_ids, observation.attention_mask)
        lengths = tokens.sum(1).tolist()
        samples, padded = len(lengths), self._vlm.padded_length(observation)
        pinned = {"pin_memory": self._device.type == "cuda"}  # else copies to the device would wait for it
        shape = samples, padded, sum(self._vlm.stream_widths)
        streams = torch.empty(shape, dtype=self._dtype, **pinned)
        content = streams.view(torch.uint8).numpy()

        def read(row: int) -> tuple[bytes, bool]:
            key, start = sample_key(self._identity, observation, row), padded - lengths[row]
            content[row, :start] = 0
            return key, self._store.read_into(key, content[row, start:])

        keys, found = zip(*self._readers.map(read, range(samples)), strict=True)
        missing = [row for row in range(samples) if not found[row]]
        stored = StoredStreams(
            streams=streams,
            missing=torch.tensor(missing, dtype=torch.int64, **pinned),
            missing_images=torch.tensor(np.flatnonzero(observation.camera_mask[missing].numpy()), **pinned),
            missing_keys=[keys[row] for row in missing],
            missing_lengths=[lengths[row] for row in missing],
        )
        return dataclasses.replace(batch, stored=stored)

    def features(self, batch: Batch) -> VLMFeatures:
        """Features of a batch that was looked up and moved to the VLM's device; what was missing will be written."""
        observation, stored = batch.observation, batch.stored
        streams, missing = stored.streams, len(stored.missing_keys)
        self._found, self._asked = self._found + observation.batch_size - missing, self._asked + observation.batch_size
        if missing:
            whole = missing == observation.batch_size
            computed = torch.cat(
                self._vlm.streams(observation if whole else _missing_inputs(observation, stored)), dim=-1
            )
            if computed.dtype != self._dtype:
                raise RuntimeError(f"the VLM's streams are {computed.dtype}, its embeddings {self._dtype}")
            self._write(stored, computed)
            streams = computed if whole else streams.index_copy_(0, stored.missing, computed)
        return self._vlm.features(observation, list(streams.split(self._vlm.stream_widths, dim=-1)))

    def hit_share(self) -> float:
        """Share of samples found since the last call."""
        share = self._found / max(self._asked, 1)
        self._found, self._asked = 0, 0
        return share

    def close(self) -> None:
        """Write what waits to be written, and let go of the folder."""
        for pool in (self._ahead, self._readers, self._writer):
            pool.shutdown(wait=True, cancel_futures=pool is not self._writer)
        while self._unwritten:
            self._unwritten.popleft().result()
        self._store.close()

    def _write(self, stored: StoredStreams, computed: torch.Tensor) -> None:
        """Hand (M, T, channels of all streams) to the thread that writes; waits only where the disk is slower than
        training."""
        if self._store.is_full:
            return
        copied = None
        if computed.device.type == "cuda":
            host = torch.empty(computed.shape, dtype=computed.dtype, pin_memory=True)
            computed = host.copy_(computed, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unwritten.append(self._writer.submit(self._write_rows, stored, computed, copied))
        while len(self._unwritten) > _UNWRITTEN:
            self._unwritten.popleft().result()

    def _write_rows(self, stored: StoredStreams, computed: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        content = computed.view(torch.uint8).numpy()
        padded = content.shape[1]
        self._store.add(
            (key, content[row, padded - length :])
            for row, (key, length) in enumerate(zip(stored.missing_keys, stored.missing_lengths, strict=True))
        )


def _missing_inputs(observation: Observation, stored: StoredStreams) -> Observation:
    """What :meth:`VLM.streams` reads, of the missing samples alone."""
    rows = stored.missing
    return dataclasses.replace(
        observation,
        rgb=observation.rgb[rows],
        input_ids=observation.input_ids[rows],
        position_ids=observation.position_ids[:, rows],
        attention_mask=observation.attention_mask[rows],
        image_index=stored.missing_images,
    )


def sample_key(identity: bytes, observation: Observation, row: int) -> bytes:
    """Hash of everything that the VLM's answer to one sample depends on.

    Args:
        identity: of the VLM, up to 64 bytes.
        observation: on the CPU; ``row`` of its batch.
    """
    ids = observation.input_ids[row][observation.attention_mask[row]].numpy()
    rgb, shown = observation.rgb[row, -1].numpy(), observation.camera_mask[row].numpy()  # (Ncam, 3, H, W), (Ncam,)
    digest = hashlib.blake2b(digest_size=32, key=identity)
    digest.update(json.dumps([len(ids), int(shown.sum()), *rgb.shape[1:]]).encode())
    digest.update(ids)
    for camera in np.flatnonzero(shown):
        digest.update(np.ascontiguousarray(rgb[camera]))
    return digest.digest()


def vlm_identity(vlm: VLM, autocast: bool) -> bytes:
    """Hash of what the VLM computes: configuration, weights, which layers are read and in which precision.

    Weights enter by sums over rows and columns of their bits as integers: exact, the same on every device, and quick.
    Two VLMs of the same name but other weights differ; a folder that was moved does not.
    """
    encoder, config = vlm.encoder, vlm.qwen.config.to_dict()
    digest = hashlib.blake2b(digest_size=32)
    settings = {
        "version": _VERSION,
        "transformers": transformers.__version__,
        "config": _without_notes(config),
        "layers": vlm.layers,
        "kv_layers": vlm.kv_layers,
        "inputs_embeds": vlm.reads.inputs_embeds,
        "vision_only": vlm.vision_only,
        "images": encoder.image_statistics,
        "autocast": autocast,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vlm.qwen.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bits = tensor.contiguous().view(integers).reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
        for axis in (0, 1):
            digest.update(bits.sum(axis, dtype=torch.int64).cpu().numpy())
    return digest.digest()


def _without_notes(config: dict) -> dict:
    """A configuration without where it came from and who wrote it."""
    notes = ("_", "transformers_version")
    return {
        name: _without_notes(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not str(name).startswith(notes)
    }
