"""What a run would take, without training: parameters, memory per GPU, steps, disk. No weights are loaded.

Memory is an estimate. Weights, gradients, optimiser state and EMA are counted exactly; under ZeRO on ``n`` processes
gradients and AdamW's state are divided by n, ZeRO-3 divides the weights too, and both add a flat float32 copy of what
trains. Activations follow a model, per sample:

    expert   blocks x tokens x 20 h       (tokens: of the VLM and of the actions, the latter once per noise draw)
    VLM      layers x tokens x (8 C + 2 (q + k + v) + 4 I); with gradient checkpointing C per layer and one layer whole
    vision   layers x patches x (16 d + 2 m), where the VLM is tuned in full
    frozen   features x tokens x C

of 2 bytes under bf16, else 4, for h the expert's width, C the VLM's, I its MLP's, q, k, v its heads', d and m the
vision tower's. A prompt counts as 48 tokens. CUDA's own memory (about 1 GiB) and fragmentation come on top.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from apt.checkpoint import format_bytes
from apt.configs import TrainConfig
from apt.encoders.hub import load_config
from data_utils.datasets import get_dataset_class

PROMPT_TOKENS = 48
STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Count:
    """Parameters of a part of the model."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@functools.cache
def count_parameters(config: TrainConfig) -> tuple[Count, Count]:
    """Of the expert and of the VLM, by a model without memory."""
    model = _meta_model(config)
    return _count(model.expert), _count(model.vlm)


def _meta_model(config: TrainConfig) -> torch.nn.Module:
    from apt.vla import VLA  # slow to import; the launcher that describes a plan seldom does

    half = torch.bfloat16 if _is_half(config) else torch.float32
    trained = torch.bfloat16 if config.vlm_param_dtype == "bf16" else torch.float32
    with torch.device("meta"):
        return VLA(config.vla_config(), frozen_dtype=half, trained_dtype=trained, random_vlm=True)


def _is_half(config: TrainConfig) -> bool:
    return config.fp16 and config.device != "cpu"


def _count(module: torch.nn.Module) -> Count:
    numbers = {True: [0, 0], False: [0, 0]}
    for parameter in module.parameters():
        numbers[parameter.requires_grad][0] += parameter.numel()
        numbers[parameter.requires_grad][1] += parameter.numel() * parameter.element_size()
    return Count(numbers[True][0], numbers[False][0], numbers[True][1], numbers[False][1])


def activation_bytes(config: TrainConfig) -> float:
    """Of one step on one process, by this file's model."""
    qwen, expert = load_config(config.vlm), config.vla_config().expert_config()
    text, vision = qwen.text_config, qwen.vision_config
    data = config.data_configs()
    side = vision.patch_size * vision.spatial_merge_size
    images = max(d.num_cameras * d.image_hw[0] * d.image_hw[1] for d in data)
    tokens = images // side**2 + (PROMPT_TOKENS if config.train_stage == 1 else 0)
    steps = (expert.num_history + expert.num_future) * max(d.num_arms for d in data)
    numbers = expert.num_blocks * (tokens + config.noise_samples_per_obs * steps) * 20 * expert.width
    features = 2 * expert.num_layers if config.train_stage == 1 else expert.num_layers
    mode = config.vla_config().vlm_mode
    if mode == "frozen":
        numbers += features // 2 * tokens * text.hidden_size
    else:
        layers = config.vlm_layer_stride * (expert.num_layers - 2) + 1
        heads = text.num_attention_heads + 2 * text.num_key_value_heads
        layer = 8 * text.hidden_size + 2 * heads * text.head_dim + 4 * text.intermediate_size
        kept = layers * text.hidden_size + layer if config.use_gradient_checkpointing else layers * layer
        numbers += tokens * kept
        if mode == "full":
            layer = 16 * vision.hidden_size + 2 * vision.intermediate_size
            kept = vision.depth * layer
            if config.use_gradient_checkpointing:
                kept = vision.depth * vision.hidden_size + layer
            numbers += images // vision.patch_size**2 * kept
    return float(numbers * config.bs * (2 if config.fp16 else 4))


def estimate_memory(config: TrainConfig, strategy: str, processes: int) -> Memory:
    """Of one of ``processes`` GPUs under one of ``STRATEGIES``."""
    parts = count_parameters(config)
    trained = sum(part.trained for part in parts)
    trained_bytes, frozen_bytes = sum(p.trained_bytes for p in parts), sum(p.frozen_bytes for p in parts)
    weights = trained_bytes + frozen_bytes
    shares = 1 if strategy == "DDP" else processes
    if strategy == "ZeRO-3":
        weights /= processes
    if strategy != "DDP":
        weights += 4 * trained / processes
    ema = 4 * trained / (processes if strategy == "ZeRO-3" else 1) if config.ema_enabled else 0
    optimizer = 2 * trained_bytes if strategy == "DDP" else 8 * trained / shares
    return Memory(weights, trained_bytes / shares, optimizer, ema, activation_bytes(config))


def checkpoint_bytes(config: TrainConfig) -> int:
    """Size of one checkpoint file, with the optimiser's state that DDP embeds (DeepSpeed writes it beside)."""
    expert, vlm = count_parameters(config)
    trained = expert.trained_bytes + vlm.trained_bytes
    weights = expert.trained_bytes + expert.frozen_bytes + vlm.trained_bytes
    return weights + 2 * trained + (trained if config.ema_enabled else 0)


def describe_plan(config: TrainConfig, processes: int) -> str:
    """Several lines for a person: what trains, on what, for how long, what it takes.

    Args:
        processes: of the whole job.
    """
    expert, vlm = count_parameters(config)
    batch = config.bs * processes * config.gradient_accumulation_steps
    names = ", ".join(config.dataset_classes)
    datasets = [
        get_dataset_class(name)(config=data, train_stage=config.train_stage, seed=config.seed)
        for name, data in zip(config.dataset_classes, config.data_configs(), strict=True)
    ]
    episodes = sum(len(dataset) for dataset in datasets)
    frames = sum(int(dataset.lengths.sum()) for dataset in datasets)
    epoch = config.sample_multiplex * (frames if config.sample_by == "frame" else episodes)
    start = f"run {config.name}" if config.resume else config.pretrained_ckpt or "fresh weights"
    size, numbered = checkpoint_bytes(config), config.max_iterations // config.save_interval
    wanted = Path(config.ckpt_dir).absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    lines = [
        f"plan of stage {config.train_stage}, run {config.name!r} from {start} (nothing is trained or written)",
        f"  expert      {_millions(expert)}",
        f"  VLM         {_millions(vlm)}; {config.vlm}, {config.vla_config().vlm_mode}",
        f"  data        {episodes} episodes, {frames} frames of {names}",
        f"  steps       {config.max_iterations} of {batch} samples ({processes} processes x {config.bs} x "
        f"{config.gradient_accumulation_steps}): {config.max_iterations * batch / epoch:.2f} epochs of {epoch} samples",
        f"  disk        {format_bytes(size)} per checkpoint; latest, best and {numbered} numbered: "
        f"{format_bytes((numbered + 2) * size)}, and {format_bytes(size)} while one is replaced; "
        f"{format_bytes(shutil.disk_usage(folder).free)} free in {folder}",
        f"  memory      per GPU of {processes}, estimated: weights + gradients + optimiser + EMA + activations",
    ]
    for mode in ("frozen", "lora", "full") if config.train_stage == 1 else ("frozen",):
        other = dataclasses.replace(config, vlm_finetune_mode=mode)
        for strategy in STRATEGIES:
            memory = estimate_memory(other, strategy, processes)
            chosen = mode == config.vla_config().vlm_mode and strategy == _strategy(config)
            sizes = " + ".join(format_bytes(value) for value in dataclasses.astuple(memory))
            lines.append(
                f"  {'->' if chosen else '  '}{mode:>8} {strategy:<7} {format_bytes(memory.total):>9} = {sizes}"
            )
    return "\n".join(lines)


def _strategy(config: TrainConfig) -> str:
    return f"ZeRO-{config.ds_zero}" if config.backend == "deepspeed" else "DDP"


def _millions(count: Count) -> str:
    return f"{count.trained / 1e6:.2f}M parameters trained, {count.frozen / 1e6:.2f}M frozen"
