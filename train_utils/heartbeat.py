"""Machines of one job that notice when another is gone.

A process that dies closes its connections, and the others hear of it. A machine that loses its power or its network
says nothing, and the others would wait in a collective until that times out, half an hour later. So every machine's
launcher counts up in the store that the job met at, and looks whether the others still do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

_MEETING_TIMEOUT = timedelta(hours=1)  # torchrun gives up before


class Heartbeat:
    """Context in which this machine watches the others, from when they have first been heard of.

    Args:
        address, port: of the job's store, which machine 0 serves.
        node, nodes: this machine, and how many there are.
        patience_s: seconds of silence after which a machine counts as gone.
        on_loss: called once, from another thread, when one is.
    """

    def __init__(
        self, address: str, port: int, node: int, nodes: int, patience_s: float, on_loss: Callable[[], None]
    ) -> None:
        self.lost: int | None = None
        """The machine that is gone."""
        self._endpoint, self._node, self._nodes = (address, port), node, nodes
        self._patience, self._on_loss = patience_s, on_loss
        self._interval = min(5.0, patience_s / 6)
        self._heard: dict[int, float] = {}  # when each other machine last counted up
        self._ended = threading.Event()

    def __enter__(self) -> "Heartbeat":
        # Two threads: a request to a store whose machine is gone never returns.
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()

    def _exchange(self) -> None:
        with contextlib.suppress(DistError):  # no store: silence, which the other thread judges
            tcp = TCPStore(*self._endpoint, is_master=False, wait_for_workers=False, timeout=_MEETING_TIMEOUT)
            store = PrefixStore("heartbeat", tcp)
            counts = dict.fromkeys(set(range(self._nodes)) - {self._node}, 0)
            while not self._ended.wait(self._interval):
                store.add(str(self._node), 1)
                for other, before in counts.items():
                    counts[other] = store.add(str(other), 0)
                    if counts[other] > before:
                        self._heard[other] = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            silent = [o for o, moment in list(self._heard.items()) if time.monotonic() - moment > self._patience]
            if silent:
                self.lost = min(silent)
                self._on_loss()
                return
