"""What DeepSpeed is told: ``ds_config_zero<2|3>.json`` beside this file, and the rest from the run's configuration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Protocol

from train_utils.errors import ConfigError

FILE = str(Path(__file__).resolve().parent / "ds_config_zero{}.json")
# The trainer owns these; in the file they would be a second, silent source of the same numbers.
_OURS = {
    "train_batch_size": "--bs",
    "train_micro_batch_size_per_gpu": "--bs",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--grad_clip",
    "optimizer": "--max_lr, --wd, --vlm_lr and --vlm_wd",
    "scheduler": "--num_warmup",
    "fp16": "--fp16",
    "bf16": "--fp16",
    "torch_autocast": "--fp16",
    "amp": "--fp16",
    "data_types": "--fp16",
}


class ZeroConfig(Protocol):
    """What DeepSpeed is told of a run's configuration."""

    ds_zero: int
    device: str
    bs: int
    gradient_accumulation_steps: int
    grad_clip: float
    fp16: bool


def check_deepspeed() -> None:
    """Raises ``ConfigError`` where the package is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "backend deepspeed needs the package deepspeed, which is not installed; run bash scripts/setup.sh "
            "--deepspeed, or use --backend ddp"
        )


def deepspeed_settings(config: ZeroConfig, file: Path | None = None) -> dict:
    """DeepSpeed's configuration for a run.

    Args:
        file: read instead of the ZeRO stage's own.
    Raises:
        ConfigError: the file is not JSON, is for another stage, or sets what the run's configuration decides.
    """
    file = file or Path(FILE.format(config.ds_zero))
    try:
        settings = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); restore it") from error
    for key, flag in _OURS.items():
        if key in settings:
            raise ConfigError(f"{file} sets {key!r}, which {flag} decides; remove it from the file")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != config.ds_zero:
        raise ConfigError(f"{file} is for ZeRO stage {stage}, this run asks for ds_zero {config.ds_zero}; set it there")
    return settings | {
        "train_micro_batch_size_per_gpu": config.bs,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.grad_clip,
        # No module is "safe" for exchange in half precision: gradients are averaged in float32, as under DDP.
        "torch_autocast": {"enabled": config.fp16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
