"""What a run would take, without training: parameters, memory per GPU, steps, disk. No weights are loaded.

Memory is an estimate. Weights, gradients, optimiser state and EMA are counted exactly; under ZeRO on ``n`` processes
gradients and AdamW's state are divided by n, ZeRO-3 divides the weights too, and both add a flat float32 copy of what
trains. Activations follow a model, per sample:

    expert   blocks x tokens x 20 h       (tokens: of the actions, once per noise draw, and of the VLM where they run
                                            through the blocks, as in apt)
    VLM      layers x tokens x (8 C + 2 (q + k + v) + 4 I); with gradient checkpointing C per layer and one layer whole
    vision   layers x patches x (16 d + 2 m), where the VLM is tuned in full
    frozen   tokens x the channels of all that the expert reads
    text     with a language-modelling loss: all VLM layers, image-text pairs as samples of their own, a chunk's logits

of 2 bytes under bf16, else 4, for h the expert's width, C the VLM's, I its MLP's, q, k, v its heads', d and m the
vision tower's. A prompt counts as 48 tokens. Under bf16 a copy of every float32 matrix that trains is added, which
autocast keeps through the step on every GPU, whatever is sharded. CUDA's own memory (about 1 GiB) and fragmentation
come on top.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apt.configs import TrainConfig
from apt.model.config import VLAConfig
from apt.model.language_loss import chunk_rows
from data_utils.batches.loader import batches_per_epoch
from data_utils.datasets import get_dataset_class
from data_utils.samples.split import split
from train_utils.saving import format_bytes

if TYPE_CHECKING:
    from apt.model.vla import VLA
    from apt.model.vlm import VLM

PROMPT_TOKENS = 48
STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Count:
    """Parameters of a part of the model."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    cast_bytes: int
    """Of the bf16 copies of float32 matrices that train, as autocast makes them."""


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


def count_parameters(config: TrainConfig) -> tuple[Count, Count]:
    """Of the expert and of the VLM."""
    model = bare_model(config)
    return _count(model.expert), _count(model.vlm, config.lm_loss_weight > 0)


def bare_model(config: TrainConfig) -> VLA:
    """The policy without memory for its tensors."""
    frozen = torch.bfloat16 if _is_half(config) else torch.float32
    trained = torch.bfloat16 if config.vlm_param_dtype == "bf16" else torch.float32
    return _bare_model(dataclasses.replace(config.vla_config(), gradient_checkpointing=False), frozen, trained)


@functools.cache
def _bare_model(policy: VLAConfig, frozen: torch.dtype, trained: torch.dtype) -> VLA:
    from apt.model.vla import VLA  # slow to import; the launcher that describes a plan seldom does

    with torch.device("meta"):
        return VLA(policy, frozen_dtype=frozen, trained_dtype=trained, random_vlm=True)


def _is_half(config: TrainConfig) -> bool:
    return config.fp16 and config.device != "cpu"


def _count(module: torch.nn.Module, predicts_text: bool = False) -> Count:
    numbers = {True: [0, 0], False: [0, 0]}
    for parameter in module.parameters():
        numbers[parameter.requires_grad][0] += parameter.numel()
        numbers[parameter.requires_grad][1] += parameter.numel() * parameter.element_size()
    # A head that is tied to the token embedding is a matrix of the step where a loss asks for words.
    tied = set() if predicts_text else {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [m.weight for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))]
    cast = [w for w in matrices if w.requires_grad and w.dtype == torch.float32 and id(w) not in tied]
    return Count(
        numbers[True][0], numbers[False][0], numbers[True][1], numbers[False][1], sum(2 * w.numel() for w in cast)
    )


def activation_bytes(config: TrainConfig) -> float:
    """Of one step on one process, by this file's model; copies of weights included."""
    model = bare_model(config)
    expert, vlm = model.expert.config, model.vlm
    text, vision = vlm.qwen.config.text_config, vlm.qwen.config.vision_config
    data = config.data_configs()
    side = vision.patch_size * vision.spatial_merge_size
    images = max(d.num_cameras * d.image_hw[0] * d.image_hw[1] for d in data)
    tokens = images // side**2 + (PROMPT_TOKENS if config.train_stage == 1 else 0)
    steps = (expert.num_history + expert.num_future) * max(d.num_arms for d in data)
    through = tokens * model.expert.carries_vl_tokens + config.noise_samples_per_obs * steps
    numbers = len(model.expert.blocks) * through * 20 * expert.width
    if vlm.mode == "frozen":
        numbers += tokens * sum(vlm.stream_widths)
    else:
        numbers += _trained_vlm_numbers(config, vlm, images)
    numbers *= config.bs
    if config.image_text_pairs is not None:
        pair = max(d.image_hw[0] * d.image_hw[1] for d in data)
        numbers += config.image_text_bs * _trained_vlm_numbers(config, vlm, pair)
    logits = 0
    if config.lm_loss_weight > 0:
        targets = min(config.bs * PROMPT_TOKENS, chunk_rows(text.vocab_size))
        logits = targets * text.vocab_size * (3 * 4 + (2 if config.fp16 else 0))  # with softmax and gradient
    if not config.fp16:
        return float(4 * numbers + logits)
    return float(2 * numbers + logits + sum(part.cast_bytes for part in count_parameters(config)))


def _trained_vlm_numbers(config: TrainConfig, vlm: VLM, pixels: int) -> int:
    """Kept of one sample in a VLM that trains, ``pixels`` of all its images together."""
    text, vision = vlm.qwen.config.text_config, vlm.qwen.config.vision_config
    tokens = pixels // (vision.patch_size * vision.spatial_merge_size) ** 2 + PROMPT_TOKENS
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    layer = 8 * text.hidden_size + 2 * heads * text.head_dim + 4 * text.intermediate_size
    layers = text.num_hidden_layers if config.lm_loss_weight > 0 else vlm.num_layers
    checkpointing = config.use_gradient_checkpointing
    kept = layers * text.hidden_size + layer if checkpointing else layers * layer
    numbers = tokens * kept
    if vlm.mode == "full":
        layer = 16 * vision.hidden_size + 2 * vision.intermediate_size
        kept = vision.depth * vision.hidden_size + layer if checkpointing else vision.depth * layer
        numbers += pixels // vision.patch_size**2 * kept
    return numbers


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
    Raises:
        DataError: the data cannot be found, or fill no batch.
    """
    expert, vlm = count_parameters(config)
    start = f"run {config.name}" if config.resume else config.pretrained_ckpt or "fresh weights"
    rates = f"{config.max_lr:g}"
    if config.vla_config().vlm_mode != "frozen":
        rates = f"expert {rates}, VLM {config.max_lr if config.vlm_lr is None else config.vlm_lr:g}"
    lines = [
        f"plan of stage {config.train_stage}, run {config.name!r} from {start} (nothing is trained)",
        f"  expert      {_millions(expert)}",
        f"  VLM         {_millions(vlm)}; {config.vlm}, {config.vla_config().vlm_mode}",
        *_describe_steps(config, processes),
        f"  rate        {rates}; {config.num_warmup} steps of linear warm-up, then constant"
        + (f", falling over the last {config.num_decay}" if config.num_decay else ""),
        f"  disk        {_describe_disk(config)}",
        f"  memory      per GPU of {processes}, estimated; CUDA's own (about 1 GiB) and fragmentation come on top",
        *_memory_table(config, processes),
    ]
    return "\n".join(lines)


def _describe_steps(config: TrainConfig, processes: int) -> list[str]:
    datasets = [
        get_dataset_class(name)(config=data, train_stage=config.train_stage, seed=config.seed)
        for name, data in zip(config.dataset_classes, config.data_configs(), strict=True)
    ]
    datasets, held_out = split(datasets, config.eval_split)
    apart = f"; {sum(len(dataset) for dataset in held_out)} episodes held out" if held_out else ""
    episodes = sum(len(dataset) for dataset in datasets)
    frames = sum(int(dataset.lengths.sum()) for dataset in datasets)
    items = config.sample_multiplex * (frames if config.sample_by == "frame" else episodes)
    epoch = batches_per_epoch(items // processes, config.bs) * config.bs * processes  # the rest fills no batch
    batch = config.bs * processes * config.gradient_accumulation_steps
    return [
        f"  data        {episodes} episodes, {frames} frames of {', '.join(config.dataset_classes)}{apart}",
        f"  steps       {config.max_iterations} of {batch} samples ({processes} processes x {config.bs} x "
        f"{config.gradient_accumulation_steps}): {config.max_iterations * batch / epoch:.2f} epochs of {epoch} samples",
    ]


def _describe_disk(config: TrainConfig) -> str:
    size, numbered = checkpoint_bytes(config), config.max_iterations // config.save_interval
    wanted = Path(config.ckpt_dir).absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    cache = f"; features: {config.cache_limit_gb:g} GB at most in {config.cache_vlm_features}"
    return (
        f"{format_bytes(size)} per checkpoint; latest, best and {numbered} numbered: "
        f"{format_bytes((numbered + 2) * size)}, and {format_bytes(size)} while one is replaced; "
        f"{format_bytes(shutil.disk_usage(folder).free)} free in {folder}"
        + (cache if config.cache_vlm_features else "")
    )


def _memory_table(config: TrainConfig, processes: int) -> list[str]:
    """A line per mode of the VLM and strategy, this run's marked, under a line of titles."""
    titles = (*(field.name for field in dataclasses.fields(Memory)), "total")
    lines = [" " * 29 + "".join(f"{title:>12}" for title in titles)]
    own = config.vla_config().vlm_mode
    modes = [("frozen", False), ("lora", False), ("lora", True), ("full", False), ("full", True)]
    for mode, checkpointing in modes if config.train_stage == 1 else modes[:1]:
        changes = {"vlm_finetune_mode": mode, "use_gradient_checkpointing": checkpointing, "cache_vlm_features": None}
        changes["knowledge_insulation"] = False  # costs nothing and saves nothing
        if mode == "frozen":
            changes |= {"lm_loss_weight": 0.0, "image_text_pairs": None}
        other = dataclasses.replace(config, **changes)
        is_own = mode == own and (mode == "frozen" or checkpointing == config.use_gradient_checkpointing)
        for strategy in STRATEGIES:
            memory = estimate_memory(other, strategy, processes)
            chosen = is_own and strategy == _strategy(config)
            label = f"{'->' if chosen else '  '} {mode}{' --gc' if checkpointing else ''}"
            sizes = (*dataclasses.astuple(memory), memory.total)
            lines.append(f"  {label:<16}{strategy:<11}" + "".join(f"{format_bytes(value):>12}" for value in sizes))
    return lines


def _strategy(config: TrainConfig) -> str:
    return f"ZeRO-{config.ds_zero}" if config.backend == "deepspeed" else "DDP"


def _millions(count: Count) -> str:
    return f"{count.trained / 1e6:.2f}M parameters trained, {count.frozen / 1e6:.2f}M frozen"
