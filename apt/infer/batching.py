"""Queries of several sessions in one pass of the policy, each answered as if it had been alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from apt.infer.turns import FairLock
from apt.model.objectives.base import Guide
from data_utils.types import Observation

ALONG_TOKENS = ("input_ids", "position_ids", "attention_mask")
RECENT = 2.0  # s: who asked within these may well ask again


@dataclass(frozen=True)
class Request:
    """All that the policy needs for one query, as :meth:`apt.infer.policy.Policy.request` makes it."""

    observation: Observation
    """Of batch size 1, on the CPU."""
    noise: torch.Tensor
    """(S, Nee, Ta, 10), on the policy's device."""
    run: tuple[int, str]
    """Denoising steps and sampler."""
    pad_id: int
    """Token written on padding."""
    guide: Guide | None = None

    @property
    def kind(self) -> tuple:
        """Requests of one kind can share a pass: all is alike but the length of the prompt."""
        fields = dataclasses.fields(self.observation)
        tensors = {f.name: getattr(self.observation, f.name) for f in fields if f.name not in ("prompt", "image_index")}
        shapes = tuple(value.shape for name, value in tensors.items() if name not in ALONG_TOKENS)
        guide = None if self.guide is None else (self.guide.target.shape, self.guide.weight.shape)
        return (shapes, self.noise.shape, self.run, self.pad_id, guide)


def join(requests: Sequence[Request], pad_multiple: int = 1) -> tuple[Observation, torch.Tensor, Guide | None]:
    """Requests of one kind as a batch: observation, noise (B * S, Nee, Ta, 10) and guide, a request's samples side by
    side. The shorter prompts are padded on the left, to a multiple of ``pad_multiple``."""
    observations = [request.observation for request in requests]
    longest = max(observation.input_ids.shape[1] for observation in observations)
    longest = -(-longest // pad_multiple) * pad_multiple
    cameras = observations[0].camera_mask.shape[1]
    joined = {}
    for item in dataclasses.fields(Observation):
        values = [getattr(observation, item.name) for observation in observations]
        if item.name == "prompt":
            joined[item.name] = [prompt for value in values for prompt in value]
        elif item.name == "image_index":
            joined[item.name] = torch.cat([value + row * cameras for row, value in enumerate(values)])
        elif item.name in ALONG_TOKENS:
            # As data_utils.batches.collate.pad_prompts pads.
            fill = {"input_ids": requests[0].pad_id, "position_ids": 1, "attention_mask": False}[item.name]
            padded = [F.pad(value, (longest - value.shape[-1], 0), value=fill) for value in values]
            joined[item.name] = torch.cat(padded, dim=1 if item.name == "position_ids" else 0)
        else:
            joined[item.name] = torch.cat(values)
    guide = None
    if requests[0].guide is not None:
        samples = len(requests[0].noise)

        def along_samples(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([tensor.expand(samples, *tensor.shape[1:]) for tensor in tensors])

        guide = Guide(
            along_samples([request.guide.target for request in requests]),
            along_samples([request.guide.weight for request in requests]),
        )
    return Observation(**joined), torch.cat([request.noise for request in requests]), guide


@dataclass
class Answer:
    """What became of a request."""

    states: np.ndarray
    """(S, Ta, Nee, 17) in the world, float64."""
    wait: float
    """s until its pass began."""
    prepare: float
    """s that it took to make the request."""
    seconds: dict[str, float]
    """Of the pass, by stage."""


@dataclass
class _Ticket:
    session: object
    prepare: Callable[[], Request | None]
    asked: float = field(default_factory=time.perf_counter)
    answer: Answer | None = None
    error: BaseException | None = None
    done: bool = False


class QueryQueue:
    """Whoever has waited longest runs a pass, for itself and for those who wait behind it.

    Args:
        infer: :meth:`apt.infer.policy.Policy.infer`.
        max_batch: requests in a pass at most.
        max_wait: s to wait for others who asked lately, and so will again, before a pass is run without them. Whoever
            is alone never waits.
    """

    def __init__(
        self,
        infer: Callable[[Sequence[Request]], tuple[list[np.ndarray], dict[str, float]]],
        max_batch: int,
        max_wait: float,
    ) -> None:
        if max_batch < 1 or not max_wait >= 0:
            raise ValueError(
                f"max_batch is {max_batch} and max_wait {max_wait}; wanted 1 or more, and 0 or more seconds"
            )
        self._infer, self.max_batch, self.max_wait = infer, max_batch, max_wait
        self.turns = FairLock()
        self._arrival = threading.Condition()  # guards what follows
        self._waiting: deque[_Ticket] = deque()
        self._last_asked: dict[int, float] = {}

    def ask(self, session: object, prepare: Callable[[], Request | None]) -> Answer | None:
        """The answer to a request that is made by ``prepare`` when its turn has come; None where that made none.

        ``prepare`` may run in another session's thread. Of one session one query is in a pass at most. Raises what
        ``prepare`` or the policy raises.
        """
        ticket = _Ticket(session, prepare)
        with self._arrival:
            self._waiting.append(ticket)
            self._last_asked[id(session)] = time.monotonic()
            self._arrival.notify_all()
        try:
            with self.turns:
                if not ticket.done:
                    self._serve(self._take(ticket))
        finally:
            with self._arrival:
                if ticket in self._waiting:  # interrupted before its turn
                    self._waiting.remove(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _take(self, mine: _Ticket) -> list[_Ticket]:
        """Those who share the pass with ``mine``, in the order of asking."""
        until = time.monotonic() + self.max_wait
        with self._arrival:
            while len(self._waiting) < self._expected() and (left := until - time.monotonic()) > 0:
                self._arrival.wait(left)
            taken, sessions = [mine], {id(mine.session)}
            for ticket in self._waiting:
                if len(taken) < self.max_batch and id(ticket.session) not in sessions:
                    taken.append(ticket)
                    sessions.add(id(ticket.session))
            for ticket in taken:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
        return taken

    def _expected(self) -> int:
        """How many may be in this pass, going by who asked lately."""
        since = time.monotonic() - RECENT
        self._last_asked = {session: asked for session, asked in self._last_asked.items() if asked > since}
        return min(self.max_batch, len(self._last_asked))

    def _serve(self, tickets: list[_Ticket]) -> None:
        kinds: dict[tuple, list[tuple[_Ticket, Request, float]]] = {}
        for ticket in tickets:
            began = time.perf_counter()
            try:
                request = ticket.prepare()
            except Exception as error:  # of this session alone; raised where it asked
                ticket.error, ticket.done = error, True
                continue
            if request is None:
                ticket.done = True
            else:
                kinds.setdefault(request.kind, []).append((ticket, request, time.perf_counter() - began))
        for group in kinds.values():
            self._answer(group)

    def _answer(self, group: list[tuple[_Ticket, Request, float]]) -> None:
        try:
            self._run(group)
        except Exception as error:  # raised where it asked
            if len(group) > 1:  # what is wrong with one must not be another's
                for one in group:
                    self._answer([one])
            else:
                group[0][0].error, group[0][0].done = error, True

    def _run(self, group: list[tuple[_Ticket, Request, float]]) -> None:
        began = time.perf_counter()
        states, seconds = self._infer([request for _, request, _ in group])
        for (ticket, _, prepare), found in zip(group, states, strict=True):
            wait = max(0.0, began - ticket.asked - prepare)
            ticket.answer = Answer(found, wait, prepare, seconds)
            ticket.done = True
