"""A trained policy in memory, shared by any number of planner sessions."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from apt.configs import TrainConfig
from apt.infer.batching import QueryQueue, Request, join
from apt.infer.loading import load_policy, merge_adapters
from apt.infer.stages import GraphedStages, Stages, check_compile_mode
from apt.model.action_scale import ACTION_DIM
from apt.model.compilation import pad_multiple
from apt.model.encoders.prompts import PromptTokenizer
from apt.model.experts.context import SamplingRun
from apt.model.objectives.base import Guide, Schedule
from apt.model.vla import VLA
from data_utils.types import Observation

MAX_BATCH = 16  # queries in a pass, unless told otherwise; compiled, each size costs minutes


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; None: the first GPU where there is one, else the CPU. Raises ``ValueError``."""
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; wanted e.g. 'cuda:0' or 'cpu'") from error
    if picked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (picked.index or 0) >= count:
            raise ValueError(f"device {device!r} was asked for, torch sees {count} CUDA devices; use device='cpu'")
    return picked


class Policy:
    """Model, configuration and everything that does not belong to one session. Thread-safe.

    Args:
        model: with its weights loaded; it is moved to ``device`` and changed for inference.
        train_config: it was trained with.
        device: None: the first GPU where there is one, else the CPU.
        compile: ``none``, ``compile`` (torch.compile) or ``graphs`` (that, replayed as CUDA graphs). The first query of
            each shape compiles for minutes: see :meth:`apt.infer.planner.TrajPlanner.warm_up`.
    """

    def __init__(
        self,
        model: VLA,
        train_config: TrainConfig,
        device: str | torch.device | None = None,
        compile: str = "none",
    ) -> None:
        self.device = pick_device(device)
        check_compile_mode(compile, self.device)
        self.train_config = train_config
        self.compile = compile
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._half = train_config.fp16 and self.device.type == "cuda"
        if self._half:
            round_weights(self.model.expert)
        self._stages = GraphedStages(model) if compile == "graphs" else Stages(model, compiled=compile == "compile")
        self._runs: dict[tuple[int, str], SamplingRun] = {}
        self._tokenizers: dict[tuple[int, int], PromptTokenizer] = {}
        self.set_batching()
        self._setup = threading.Lock()  # guards the tokenizers

    @classmethod
    def load(
        cls,
        ckpt_path: str | Path,
        device: str | torch.device | None = None,
        use_ema: bool = False,
        compile: str = "none",
    ) -> "Policy":
        """From a run's ``ckpt_*.pt`` or an exported folder; LoRA adapters are merged into the weights.

        Raises:
            CheckpointError, CheckpointMismatch: see :func:`apt.infer.loading.load_policy`.
            ValueError: a device that is not there, or a compile mode that it cannot run.
        """
        check_compile_mode(compile, pick_device(device))  # before minutes of loading
        model, config = load_policy(ckpt_path, pick_device(device), use_ema)
        merge_adapters(model.vlm.qwen)
        return cls(model, config, device, compile)

    @property
    def pad_multiple(self) -> int:
        """The prompt length is rounded up to a multiple of this."""
        return pad_multiple(compiled=self.compile != "none")

    def prompt_tokenizer(self, image_hw: tuple[int, int]) -> PromptTokenizer:
        """For images of this size; it remembers the prompts of all sessions. Raises ``ValueError`` for a bad size."""
        with self._setup:
            if image_hw not in self._tokenizers:
                self._tokenizers[image_hw] = self.model.vlm.prompt_tokenizer(image_hw)
            return self._tokenizers[image_hw]

    def generator(self, seed: int) -> torch.Generator:
        """A source of diffusion noise for one session."""
        return torch.Generator(self.device).manual_seed(seed)

    def set_batching(self, max_batch: int | None = None, max_wait: float = 0.0) -> None:
        """How many queries share a pass at most (None: 16, compiled 1), and how long (s) one waits for others; see
        :class:`apt.infer.batching.QueryQueue`. Before the first query. Raises ``ValueError``."""
        if max_batch is None:
            max_batch = MAX_BATCH if self.compile == "none" else 1
        self.queue = QueryQueue(self.infer, max_batch, max_wait)

    def request(
        self,
        observation: Observation,
        generator: torch.Generator,
        samples: int = 1,
        steps: int | None = None,
        sampler: str | None = None,
        guide: Guide | None = None,
        pad_id: int = 0,
    ) -> Request:
        """What :meth:`infer` answers.

        Args:
            observation: of batch size 1, on the CPU.
            generator: from :meth:`generator`.
            samples: S.
            steps, sampler: see :meth:`apt.model.objectives.base.Objective.schedule`.
            guide: actions to draw the samples towards.
            pad_id: token for padding the prompt, where another one is longer.
        """
        shape = (samples, observation.valid_ee.shape[1], self.model.config.num_future, ACTION_DIM)
        noise = torch.randn(shape, device=self.device, generator=generator)
        run = (len(self.schedule(steps, sampler)), self.samplers[0] if sampler is None else sampler)
        return Request(observation, noise, run, pad_id, guide)

    def infer(self, requests: Sequence[Request]) -> tuple[list[np.ndarray], dict[str, float]]:
        """Sample trajectories for requests of one kind, in one pass. Call it by ``queue.ask``, or alone.

        Returns:
            for each, states (S, Ta, Nee, 17) in the world frame, float64; and the seconds of ``transfer``, ``vlm``,
            ``prefix`` and ``denoise``.
        """
        clock = _Clock(self.device)
        autocast = torch.autocast("cuda", dtype=torch.bfloat16) if self._half else contextlib.nullcontext()
        count, samples = len(requests), len(requests[0].noise)
        if self.compile != "none":  # each size of a batch compiles once: 1, 2, 4, 8 ...
            requests = [*requests, *[requests[-1]] * ((1 << (count - 1).bit_length()) - count)]
        with torch.no_grad(), autocast:
            run = self._sampling_run(*requests[0].run)
            observation, noise, guide = join(requests, self.pad_multiple)
            observation = observation.to(self.device)
            if guide is not None:
                guide = Guide(guide.target.to(self.device), guide.weight.to(self.device))
            clock.mark("transfer")
            states = self._stages.run(observation, noise, run, guide, clock.mark)
        states = states.double().cpu().numpy()  # waits for the device
        return np.split(states[: count * samples], count), clock.seconds()

    @property
    def samplers(self) -> tuple[str, ...]:
        """What may be sampled by, the usual one first."""
        return self.model.expert.objective.samplers

    def schedule(self, steps: int | None = None, sampler: str | None = None) -> Schedule:
        """See :meth:`apt.model.objectives.base.Objective.schedule`. Raises ``ValueError``."""
        return self.model.expert.objective.schedule(steps, sampler)

    def _sampling_run(self, steps: int, sampler: str) -> SamplingRun:
        key = (steps, sampler)
        if key not in self._runs:
            self._runs[key] = self.model.expert.sampling_run(steps, sampler)
        return self._runs[key]


def round_weights(expert: nn.Module) -> None:
    """Round the linear layers' weights to bfloat16 for good, as autocast would at every call."""
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


class _Clock:
    """Times of stages on the device, read when all are done: on CUDA by events, without waiting in between."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("start")

    def mark(self, stage: str) -> None:
        """``stage`` ends here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Per stage; on CUDA, the device must have finished."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return {stage: 1e-3 * before.elapsed_time(event) for (_, before), (stage, event) in pairs}
        return {stage: moment - before for (_, before), (stage, moment) in pairs}
