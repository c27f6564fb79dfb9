"""DeepSpeed ZeRO-2 and ZeRO-3 behind the trainer's back-end interface.

ZeRO-2 shards gradients and optimizer state over the ranks, ZeRO-3 parameters too: outside of a module's forward and
backward pass such a parameter is empty, and its ``ds_tensor`` is this rank's part, flat and padded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train_utils.backend import Processes
from train_utils.deepspeed_settings import ZeroConfig, check_deepspeed, deepspeed_settings
from train_utils.optimizer_shards import (
    check_partitions,
    discard_pending,
    finish,
    read_shard,
    remove_beyond,
    write_pending,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend(Processes):
    """ZeRO over the ranks of torchrun; a single process works too.

    Args:
        config: its ``ds_zero`` is the stage.
    Raises:
        ConfigError: deepspeed is not installed, or its settings contradict the configuration.
    """

    def __init__(self, config: ZeroConfig) -> None:
        check_deepspeed()
        self._settings = deepspeed_settings(config)
        self._stage = config.ds_zero
        super().__init__(config.device, group_of_one=True)
        _initialize(self.device)

    # -- training --------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
        import deepspeed

        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _split_groups_by_dtype(optimizer)
        # Which parameter lies where in the flat shards; shards fit where these lists and the sizes agree.
        self._layout = [[named[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._optimizer = optimizer
        root = _PlainOutput(model)
        self._engine, *_ = deepspeed.initialize(
            model=root, optimizer=optimizer, config=self._settings, dist_init_required=False
        )
        if self._stage == 3:
            for parameter in model.bare_parameters():  # whole from the start of a pass to its end
                deepspeed.zero.register_external_parameter(root, parameter)

        def forward(*args, **kwargs) -> Any:
            output = self._engine(*args, **kwargs)
            return root.kind(**output)

        return forward

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        zero = self._engine.optimizer
        zero.clip_grad = max_norm
        self._engine.step()
        # DeepSpeed reads the norm on the host itself and skips the update on every rank where it is not finite.
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32, device=self.device)
        return norm, torch.as_tensor(not zero.overflow, device=self.device)

    # -- parameters ------------------------------------------------------------------------------------------------

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        if self._stage == 2:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def trained_parts(self) -> list[torch.Tensor]:
        return [p.ds_tensor for p in self._trained] if self._stage == 3 else self._trained

    def join(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._join(*pair) for pair in zip(parts, self._trained, strict=True)] if self._stage == 3 else parts

    def _join(self, part: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """A whole tensor on the CPU of the main rank; elsewhere, where nobody reads it, an empty one."""
        whole = part.new_empty(self.world_size * part.numel())
        dist.all_gather_into_tensor(whole, part.contiguous())
        if not self.is_main:
            return part.new_empty(0)
        return whole[: parameter.ds_numel].view(parameter.ds_shape).cpu()

    def split(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._stage == 2:
            return whole
        shapes = [tuple(p.ds_shape) for p in self._trained]
        if [tuple(tensor.shape) for tensor in whole] != shapes:
            raise ValueError(f"{len(whole)} tensors do not match the model's {len(shapes)} trained ones")
        return [self._split(*pair) for pair in zip(whole, self._trained, strict=True)]

    def _split(self, whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        part = torch.zeros_like(parameter.ds_tensor)
        own = whole.flatten()[self.rank * part.numel() : (self.rank + 1) * part.numel()]
        part[: own.numel()].copy_(own)
        return part

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saving(self, latest: Path) -> Iterator[dict]:
        identity = self.gather([secrets.token_hex(8)])[0]
        try:
            write_pending(latest, self.rank, identity, self._optimizer_state())
            self.barrier()
            yield {"optimizer_shards": {"identity": identity, **self._kind()}}
            self.barrier()
        except BaseException:
            discard_pending(latest, self.rank)
            raise
        finish(latest, self.rank)
        if self.is_main:
            remove_beyond(latest, self.world_size)

    def load_optimizer_state(self, content: dict, latest: Path) -> None:
        saved = content.get("optimizer_shards")
        problem = None
        try:
            self._restore(saved, latest)
        except ValueError as error:
            problem = str(error)
        problems = self.gather([] if problem is None else [problem])
        if problems:  # all ranks start fresh where one must
            self._optimizer.state.clear()
            raise ValueError(problems[0])

    def _restore(self, saved: dict | None, latest: Path) -> None:
        if saved is None:
            raise ValueError("the checkpoint names no optimizer shards (it was not written under --backend deepspeed)")
        kind = self._kind()
        if not isinstance(saved, dict) or not {"identity", *kind} <= saved.keys():
            raise ValueError(f"its entry optimizer_shards is malformed: wanted identity, {', '.join(kind)}")
        if {key: saved[key] for key in kind} != kind:
            raise ValueError(
                f"its optimizer shards are ZeRO-{saved['zero_stage']}'s of {saved['world_size']} processes, this run "
                f"is ZeRO-{kind['zero_stage']} on {kind['world_size']}"
            )
        state = read_shard(latest, self.rank, saved["identity"])
        masters = self._masters()
        if state.get("layout") != self._layout or state.get("numel") != [master.numel() for master in masters]:
            raise ValueError("its optimizer shards are of other trained parameters than this run's")
        check_partitions(state, masters)
        for index, master in enumerate(masters):
            if moments := state["moments"].get(index):
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(moments["step"]), device=master.device),
                    **{name: moments[name].to(master.device, copy=True) for name in _MOMENTS},
                }
            if index in state["masters"]:
                master.data.copy_(state["masters"][index])

    def _optimizer_state(self) -> dict:
        """This rank's shard: moments of every flat partition, and master weights that are finer than the weights."""
        masters = self._masters()
        moments = {
            index: {"step": float(state["step"]), **{name: state[name] for name in _MOMENTS}}
            for index, master in enumerate(masters)
            if (state := self._optimizer.state.get(master))
        }
        finer = {i: masters[i].detach() for i, parts in enumerate(self._parts()) if parts.dtype != masters[i].dtype}
        return {
            "layout": self._layout,
            "numel": [master.numel() for master in masters],
            "moments": moments,
            "masters": finer,
        }

    def _kind(self) -> dict:
        return {"zero_stage": self._stage, "world_size": self.world_size}

    def _masters(self) -> list[torch.Tensor]:
        """The flat float32 partitions that the optimizer updates."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _parts(self) -> list[torch.Tensor]:
        """The same partitions as the model computes with them."""
        zero = self._engine.optimizer
        return zero.fp16_partitioned_groups_flat if self._stage == 3 else zero.bit16_groups_flat


class _PlainOutput(nn.Module):
    """A model whose output is a plain dict: DeepSpeed finds tensors to hook in tuples and dicts alone.

    ``kind`` is the class of the last output, which is made of keyword arguments named as its attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        output = self.model(*args, **kwargs)
        self.kind = type(output)
        return vars(output)


def _initialize(device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there already."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # it says a lot, on every rank
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)  # DeepSpeed's calls
    if device.type == "cpu":
        # The shared-memory transport would be compiled first; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


def _split_groups_by_dtype(optimizer: torch.optim.Optimizer) -> None:
    """One parameter group per data type: ZeRO lays each group out in one flat tensor."""
    groups = []
    for group in optimizer.param_groups:
        dtypes = dict.fromkeys(p.dtype for p in group["params"])
        groups += [{**group, "params": [p for p in group["params"] if p.dtype == dtype]} for dtype in dtypes]
    optimizer.param_groups[:] = groups
