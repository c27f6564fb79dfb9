"""Checkpoint files as the authors' runs wrote them, at tiny size: same names, layouts and data types.

Names are those of the recorded expert (``tests/golden/action_expert``); the VLM is the built-in one, or a folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from apt.model.encoders.hub import load_config, resolve


def deep_vlm(folder: Path, layers: int) -> Path:
    """A tiny VLM of another depth, in Hugging Face's layout."""
    source = Path(resolve("tiny"))
    values = json.loads((source / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = layers
    values["text_config"].pop("layer_types", None)
    config = Qwen3VLConfig.from_dict(values)
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def expert_weights(depth: int, stage: int, width: int, heads: int, features: int, dtype: torch.dtype) -> dict:
    """Random tensors under the released names, in the order of the released modules."""
    h, generator = width, torch.Generator().manual_seed(depth + stage)
    shapes: dict[str, tuple[int, ...]] = {"context_encoder.proj_input": (h, features)}
    shapes["context_encoder.proj_pe"] = (h, 2)
    shapes |= {f"context_encoder.proj_vl.{i}": (h, features) for i in range(depth)}
    named: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        named |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, inputs in (("hist_enc", 9), ("traj_enc", 10), ("abs_pos_enc", 3), ("denoising_time_embed.1", h)):
        for index, shape in ((0, (h, inputs)), (1, (h,)), (3, (h, h))):
            named |= {f"dp_head.{name}.{index}.weight": shape, f"dp_head.{name}.{index}.bias": (h,)}
    named |= {"dp_head.arm_id_embed": (1, 4, 1, h), "dp_head.traj_context_attn.gate": (depth, h)}
    for block in range(depth if stage else depth // 2):
        prefix = f"dp_head.traj_context_attn.layers.{block}"
        named |= {f"{prefix}.attn.{n}_norm.weight": (h // heads,) for n in "qk"}
        named |= {f"{prefix}.attn.to_qkv.weight": (3 * h, h), f"{prefix}.attn.to_qkv.bias": (3 * h,)}
        named |= {f"{prefix}.attn.to_out.weight": (h, h), f"{prefix}.attn.to_out.bias": (h,)}
        named |= {f"{prefix}.ffn.{n}_proj.weight": (2 * h, h) for n in ("gate", "up")}
        named |= {f"{prefix}.ffn.down_proj.weight": (h, 2 * h)}
        for norm in (1, 2):
            named |= {f"{prefix}.norm{norm}.norm_vl.weight": (h,)}
            named |= {f"{prefix}.norm{norm}.norm_a.film.modulation.weight": (2 * h, h)}
            named |= {f"{prefix}.norm{norm}.norm_a.film.modulation.bias": (2 * h,)}
    named |= {"dp_head.final_norm.weight": (h,), "dp_head.act_head.weight": (10, h), "dp_head.act_head.bias": (10,)}
    return {n: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for n, shape in named.items()}


def vlm_weights(vlm: str, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``full``: every tensor, the tied head included; ``lora``: adapters of rank 16 alone."""
    qwen = Qwen3VLForConditionalGeneration.from_pretrained(resolve(vlm))
    if kind == "full":
        return {f"vlm._qwen.{name}": tensor.detach().to(dtype).clone() for name, tensor in qwen.state_dict().items()}
    adapters = {}
    for name, parameter in qwen.named_parameters():
        if "language_model.layers" in name and "_proj.weight" in name:
            stem = f"vlm._qwen.{name.removesuffix('.weight')}"
            rows, columns = parameter.shape
            adapters[f"{stem}.lora_A.default.weight"] = torch.full((16, columns), 0.01, dtype=dtype)
            adapters[f"{stem}.lora_B.default.weight"] = torch.full((rows, 16), 0.01, dtype=dtype)
    return adapters


def write_release(
    folder: Path,
    layout: str,
    vlm: str = "tiny",
    depth: int = 4,
    stage: int = 1,
    dtype: torch.dtype = torch.float32,
    vlm_kind: str | None = None,
    model: tuple[str, int, int] = ("tiny", 192, 3),
    ema: bool = False,
    stride: int = 1,
) -> Path:
    """``folder/ckpt_latest.pt`` and the configuration beside it.

    Args:
        layout: ``ddp`` (optimizer, scheduler and scaler inside) or ``deepspeed`` (none).
        vlm_kind: None, ``full`` or ``lora``.
    """
    folder.mkdir(parents=True)
    size, width, heads = model
    weights = expert_weights(depth, stage, width, heads, load_config(vlm).text_config.hidden_size, dtype)
    content = {"weights": weights, "current_iters": 100000, "last_ep": 12}
    content |= {"best_score": 1.5, "latest_score": 1.75, "lr": 1e-4}
    trained = list(weights.values())
    if vlm_kind:
        content["vlm_weights"] = vlm_weights(vlm, vlm_kind, dtype)
        trained += [tensor for name, tensor in content["vlm_weights"].items() if "lm_head" not in name]  # tied
    content["ema"] = None
    if ema:
        shadow = [tensor.float() + 1 for tensor in trained]
        content["ema"] = {"decay": 0.9995, "num_updates": 7, "shadow_params": shadow, "collected_params": None}
    if layout == "ddp":
        parameters = [torch.nn.Parameter(tensor.clone().float()) for tensor in trained]
        groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1]}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
        content |= {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "scaler": {}}
    torch.save(content, folder / "ckpt_latest.pt")
    config = {
        "model": size, "vlm": vlm, "vlm_layer_stride": stride, "vlm_finetune_mode": vlm_kind or "frozen", "bs": 64,
        "workers": 8, "fp16": True, "max_lr": 1e-4, "train_stage": stage, "dataset_classes": ["PickPlaceCan"],
        "dataset_weights": None, "sample_multiplex": 1000, "bind_cpu_affinity": True, "use_prefetcher": True,
        "some_field_of_another_version": [1, 2],
    }  # fmt: skip
    (folder / "202501020304.json").write_text(json.dumps(config))
    return folder / "ckpt_latest.pt"
