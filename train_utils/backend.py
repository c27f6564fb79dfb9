"""How processes work together: the interface every back-end meets, and DDP (one process included).

The trainer knows this interface alone; it has no branches per back-end. The other one is DeepSpeed
(``train_utils/deepspeed_backend.py``), under which a process may hold a part of each parameter only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from train_utils.optim import check_moments


class Backend(Protocol):
    """A strategy for running one model on one or many processes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take charge of model and optimizer; returns what to call in the forward pass."""

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Context of one micro-batch; gradients are exchanged on the last."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``, averaged over ranks."""

    def step(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update, clear gradients. Returns the gradient norm and whether it was finite (else nothing was
        updated), both on the device and alike on every rank."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Context in which these parameters are whole on every rank, for reading; entered by all ranks together."""

    def trained_parts(self) -> list[torch.Tensor]:
        """What this rank holds of each trained parameter, in module order; follows the updates."""

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Whole tensors, shaped as the trained parameters, of all ranks' parts; called by all ranks together."""

    def split(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part of each whole tensor. Raises ``ValueError`` where they are not the trained parameters'."""

    def saving(self, latest: Path) -> contextlib.AbstractContextManager[dict]:
        """Context around the writing of ``latest`` (the run's ``ckpt_latest.pt``), entered by all ranks together.

        Yields what the file embeds for :meth:`load_optimizer_state`; a back-end that keeps optimizer state in files of
        its own writes them beside it, so that a kill at any moment leaves files that belong together.
        """

    def load_optimizer_state(self, content: dict, latest: Path) -> None:
        """Restore from the content of the checkpoint ``latest``. Raises ``ValueError`` when it does not fit."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks."""

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest over ranks, element by element; the same on every rank to the bit."""

    def gather(self, items: list) -> list:
        """The items of all ranks, in the order of the ranks, on every rank."""

    def node_main_first(self) -> contextlib.AbstractContextManager:
        """Context that one process of each machine goes through before the others, as for work they can share."""

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class Processes:
    """The processes of a run and what they tell each other: NCCL between GPUs, gloo between CPUs.

    Ranks come from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        device: "auto", "cpu" or "cuda".
        group_of_one: make a process group for a single process too.
    """

    def __init__(self, device: str = "auto", timeout_s: float = 1800.0, group_of_one: bool = False) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = select_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        nccl = self.device.type == "cuda"
        options = {
            "backend": "nccl" if nccl else "gloo",
            "timeout": timedelta(seconds=timeout_s),
            "device_id": self.device if nccl else None,
        }
        if self.world_size > 1:
            dist.init_process_group(**options)
        elif group_of_one:
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, items: list) -> list:
        if self.world_size == 1:
            return list(items)
        parts: list[list] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    @contextlib.contextmanager
    def node_main_first(self) -> Iterator[None]:
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not is_first:
            self.barrier()
        try:
            yield
        finally:  # where it failed, the others shall find out for themselves
            if is_first:
                self.barrier()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            # gloo's thread takes the interpreter's lock to free the last collective. The interpreter's end, which waits
            # for that thread with the lock held, would wait for ever: let it have the lock now.
            time.sleep(0.5)
            dist.destroy_process_group()


class DDPBackend(Processes):
    """torch's DistributedDataParallel; plain torch for one process."""

    def __init__(self, device: str = "auto", timeout_s: float = 1800.0) -> None:
        super().__init__(device, timeout_s)
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._optimizer = optimizer
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.world_size == 1:
            self._model = model
        else:
            self._model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        return self._model

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager:
        if is_last or self.world_size == 1:
            return contextlib.nullcontext()
        return self._model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        norm = nn.utils.clip_grad_norm_(self._trained, max_norm)
        finite = torch.isfinite(norm)
        # The fused optimizer reads this flag on the device and updates nothing when it is set: no sync per step.
        self._optimizer.found_inf = (~finite).float()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def trained_parts(self) -> list[torch.Tensor]:
        return self._trained

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return parts

    def split(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        return whole

    @contextlib.contextmanager
    def saving(self, latest: Path) -> Iterator[dict]:
        yield {"optimizer": self._optimizer.state_dict()}

    def load_optimizer_state(self, content: dict, latest: Path) -> None:
        saved = content.get("optimizer")
        if saved is None:
            raise ValueError("the checkpoint embeds no optimizer state (it was not written under --backend ddp)")
        own = self._optimizer.state_dict()
        sizes = [_group_sizes(state) for state in (saved, own)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"its parameter groups hold {sizes[0]} tensors, this run's {sizes[1]}")
        parameters = dict(enumerate(p for group in self._optimizer.param_groups for p in group["params"]))
        for index, state in saved["state"].items():
            if index not in parameters:
                raise ValueError(f"it has the state of a tensor {index!r}, this run has {len(parameters)}")
            check_moments(state, parameters[index], index)
        # Hyper-parameters are this run's, the moments are the checkpoint's.
        self._optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})


def _group_sizes(state: object) -> list[int]:
    """Tensors per parameter group of an optimizer's state. Raises ``ValueError`` where it is none."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    wellformed = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    if not wellformed or not isinstance(state.get("state"), dict):
        raise ValueError("its optimizer state is malformed: wanted a dict of state and param_groups")
    return [len(group["params"]) for group in groups]


def select_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of this process. Raises ``ValueError`` where CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
