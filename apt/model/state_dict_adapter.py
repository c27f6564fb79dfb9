"""Tensor names of released checkpoints <-> names of this project's modules. The only place that knows the former."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Released prefix, ours; {} stands for a number. The rest of a name is the same in both.
_PREFIXES = [
    ("context_encoder.proj_input.", "proj_input."),
    ("context_encoder.proj_pe.", "proj_pe."),
    ("context_encoder.proj_vl.", "proj_vl."),
    ("dp_head.hist_enc.", "history_mlp."),
    ("dp_head.traj_enc.", "action_mlp."),
    ("dp_head.abs_pos_enc.", "position_mlp."),
    ("dp_head.denoising_time_embed.1.", "time_mlp."),
    ("dp_head.arm_id_embed", "arm_embedding"),
    ("dp_head.act_head.", "action_head."),
    ("dp_head.final_norm.", "final_norm."),
    ("dp_head.traj_context_attn.layers.{}.norm{}.norm_vl.", "blocks.{}.norm{}_vl."),
    ("dp_head.traj_context_attn.layers.{}.norm{}.norm_a.film.", "blocks.{}.norm{}_action."),
    ("dp_head.traj_context_attn.layers.{}.attn.", "blocks.{}.attn."),
    ("dp_head.traj_context_attn.layers.{}.ffn.", "blocks.{}.mlp."),
]
_RELEASED_GATE = "dp_head.traj_context_attn.gate"  # one (N, h) tensor there, N parameters here
_RELEASED_BLOCKS = "dp_head.traj_context_attn.layers."
_RELEASED_VLM_PREFIX = "vlm._qwen."


def _rename(name: str, to_released: bool) -> str:
    for released, ours in _PREFIXES:
        source, target = (ours, released) if to_released else (released, ours)
        match = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return target.format(*match.groups()) + name[match.end() :]
    return name  # unknown names survive, so that a load can report them


def expert_from_released(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of :class:`apt.model.experts.apt.ActionExpert` from a checkpoint's ``weights``."""
    ours = {}
    for name, tensor in released.items():
        if name == _RELEASED_GATE:
            ours.update({f"gates.{index}": row for index, row in enumerate(tensor.unbind(0))})
        else:
            ours[_rename(name, to_released=False)] = tensor
    return ours


def expert_to_released(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of :func:`expert_from_released`."""
    gates = {int(name.split(".")[1]): tensor for name, tensor in ours.items() if name.startswith("gates.")}
    released = {_rename(n, to_released=True): tensor for n, tensor in ours.items() if not n.startswith("gates.")}
    if gates:
        released[_RELEASED_GATE] = torch.stack([gates[index] for index in range(len(gates))])
    return released


def vlm_from_released(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face names (``Qwen3VLForConditionalGeneration``) from a checkpoint's ``vlm_weights``."""
    return {name.removeprefix(_RELEASED_VLM_PREFIX): tensor for name, tensor in released.items()}


def vlm_to_released(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of :func:`vlm_from_released`."""
    return {_RELEASED_VLM_PREFIX + name: tensor for name, tensor in ours.items()}


def checkpoint_blocks(weights: Mapping[str, torch.Tensor]) -> int:
    """Number of transformer blocks in a file's ``weights``."""
    return len(
        {name.removeprefix(_RELEASED_BLOCKS).split(".")[0] for name in weights if name.startswith(_RELEASED_BLOCKS)}
    )


def checkpoint_stage(weights: Mapping[str, torch.Tensor]) -> int | None:
    """0 for half as many blocks as gates, 1 for as many; None when the tensors are not an APT expert's."""
    if _RELEASED_GATE not in weights:
        return None
    depth, blocks = len(weights[_RELEASED_GATE]), checkpoint_blocks(weights)
    return {depth // 2: 0, depth: 1}.get(blocks)


def expand_va(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VA prior's tensors under the names they take in the VLA: block i becomes 2i + 1."""
    expanded = {}
    for name, tensor in weights.items():
        if name.startswith(_RELEASED_BLOCKS):
            index, rest = name.removeprefix(_RELEASED_BLOCKS).split(".", 1)
            name = f"{_RELEASED_BLOCKS}{2 * int(index) + 1}.{rest}"
        expanded[name] = tensor
    return expanded


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes of the expert in a file, read off its tensors."""

    depth: int  # N, number of gates
    blocks: int  # N in stage 1, N/2 in stage 0
    width: int
    head_width: int
    input_dim: int


def checkpoint_sizes(weights: Mapping[str, torch.Tensor]) -> CheckpointSizes:
    """Raises ``ValueError`` where the tensors are not those of an APT expert."""
    try:
        depth, width = weights[_RELEASED_GATE].shape
        input_dim = weights["context_encoder.proj_input.weight"].shape[1]
        head_width = len(weights[f"{_RELEASED_BLOCKS}0.attn.q_norm.weight"])
    except KeyError as error:
        raise ValueError(f"the file holds no APT action expert: it lacks {error.args[0]}") from None
    return CheckpointSizes(depth, checkpoint_blocks(weights), width, head_width, input_dim)
