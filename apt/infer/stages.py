"""The stages of a query on the device (VLM, the expert's prefix, denoising), eager, compiled, or as CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch

from apt.model.compilation import allow_variants
from apt.model.experts.context import SamplingRun
from apt.model.objectives.base import Guide
from apt.model.vla import VLA, robot_state
from data_utils.types import Observation, map_tensors

COMPILE_MODES = ("none", "compile", "graphs")
STAGES = ("vlm", "prefix", "denoise")

Mark = Callable[[str], None]


def check_compile_mode(mode: str, device: torch.device) -> None:
    """Raise ``ValueError`` for an unknown mode or one that the device cannot run."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"unknown compile mode {mode!r}; choose from {', '.join(COMPILE_MODES)}")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError(f"compile mode 'graphs' records CUDA graphs; the device is {device}: use 'compile' or 'none'")


class Stages:
    """Runs a query's stages one after the other.

    Args:
        model: in evaluation mode.
        compiled: by torch.compile: one graph each for the VLM, the prefix and a denoising step. Each shape compiles
            once (prompt lengths are bucketed for that); graph breaks are errors.
    """

    def __init__(self, model: VLA, compiled: bool = False) -> None:
        self._expert = model.expert
        self._vlm, self._prefix, self._step = model.vlm, model.expert.encode_prefix, model.expert.denoise_step
        if compiled:
            allow_variants()
            self._vlm, self._prefix, self._step = (
                torch.compile(function, fullgraph=True, dynamic=False)
                for function in (self._vlm, self._prefix, self._step)
            )

    def run(
        self, observation: Observation, noise: torch.Tensor, run: SamplingRun, guide: Guide | None, mark: Mark
    ) -> torch.Tensor:
        """States (B * S, Ta, Nee, 17) from ``noise`` (B * S, Nee, Ta, 10); ``mark`` hears of finished stages."""
        # Texts would be compiled in as constants, a graph for each instruction.
        observation = dataclasses.replace(observation, prompt=[])
        features = self._vlm(observation)
        mark("vlm")
        prefix = self._prefix(features, robot_state(observation), len(noise) // observation.batch_size)
        mark("prefix")
        action = self._expert.sample(prefix.context, noise, run, guide, self._step)
        states = self._expert.decode(prefix, action)
        mark("denoise")
        return states


class GraphedStages:
    """Replays CUDA graphs of :class:`Stages`, one graph per stage, recorded for each shape at first sight."""

    def __init__(self, model: VLA) -> None:
        self._stages = Stages(model, compiled=True)
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[tuple, _RecordedQuery] = {}

    def run(
        self, observation: Observation, noise: torch.Tensor, run: SamplingRun, guide: Guide | None, mark: Mark
    ) -> torch.Tensor:
        inputs = (dataclasses.replace(observation, prompt=[]), noise, guide)
        key = (tuple((t.shape, t.dtype) for t in _tensors(inputs)), guide is None, id(run))
        if key not in self._recorded:
            self._recorded[key] = _RecordedQuery(self._stages, inputs, run, self._pool)
        return self._recorded[key].replay(inputs, mark)


class _RecordedQuery:
    """A query of one shape: its inputs' places in memory, its graphs, its result's place."""

    def __init__(self, stages: Stages, inputs: tuple, run: SamplingRun, pool) -> None:
        self._run = run  # its tensors are read by the graphs
        self._inputs = map_tensors(inputs, torch.Tensor.clone)
        observation, noise, guide = self._inputs
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # compiles, chooses kernels, fills caches: none of it may be recorded
            for _ in range(3):
                stages.run(observation, noise, run, guide, lambda stage: None)
        torch.cuda.current_stream().wait_stream(warm_up)
        torch.cuda.synchronize()

        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        with contextlib.ExitStack() as recording:

            def record(stage: str) -> None:
                graph = self._graphs[stage] = torch.cuda.CUDAGraph()
                # Other threads go on with what they do on the device.
                recording.enter_context(torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"))

            def next_graph(finished: str) -> None:
                recording.close()
                if finished != STAGES[-1]:
                    record(STAGES[STAGES.index(finished) + 1])

            record(STAGES[0])
            self._result = stages.run(observation, noise, run, guide, next_graph)

    def replay(self, inputs: tuple, mark: Mark) -> torch.Tensor:
        for place, value in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            place.copy_(value, non_blocking=True)
        for stage, graph in self._graphs.items():
            graph.replay()
            mark(stage)
        return self._result.clone()


def _tensors(value) -> list[torch.Tensor]:
    """All tensors of nested dataclasses and tuples, in order."""
    found: list[torch.Tensor] = []
    map_tensors(value, found.append)
    return found
