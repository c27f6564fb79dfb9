"""The model card of an exported checkpoint: what the policy is, learned from, wants to be shown, and how to use it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from apt.configs import train_config_from_dict
from apt.hub import CARD_PLACE
from apt.model.config import meaning
from data_utils.config import DataConfig


def model_card(content: dict, config: dict, license_id: str | None = None) -> str:
    """Markdown with the Hub's metadata before it.

    Args:
        content: of a checkpoint; config: its run's configuration.
        license_id: of the weights, as the Hub knows it, e.g. apache-2.0; None: none is named.
    Raises:
        ValueError: a configuration that contradicts itself.
    """
    stage = "Stage 1 (VA prior)" if config.get("train_stage") == 0 else "Stage 2 (VLA)"
    datasets, vlm = config.get("dataset_classes", ()), config.get("vlm", "")
    tuned = content.get("vlm_weights") or {}
    kind = "frozen" if not tuned else "LoRA-tuned" if any("lora_" in name for name in tuned) else "tuned"
    license_line = f"license: {license_id}\n" if license_id else ""
    base = f"base_model: {vlm}\n" if "/" in vlm and not os.path.isabs(vlm) else ""
    parameters = sum(tensor.numel() for tensor in content["weights"].values())
    ema = bool(content.get("ema"))
    return f"""---
{license_line}library_name: apt-vla
pipeline_tag: robotics
{base}tags: [robotics, vision-language-action, apt]
---
# {config.get("name", "APT policy")}

An action expert of arch `{config.get("arch", "apt")}` ({config.get("model")}, {parameters / 1e6:.1f}M parameters), \
{stage}, after {content.get("current_iters", "unknown")} iterations on {", ".join(datasets)}, for the VLM `{vlm}` \
({kind}). Its weights are of {", ".join(f"{field} `{value}`" for field, value in meaning(config).items())}.

## What it wants to be shown

{_wanted(datasets, config)}

## How good it is

{_scores(content, config)}

## Use

```python
from apt.infer.planner import TrajPlanner

planner = TrajPlanner("{CARD_PLACE}"{", use_ema=True" if ema else ""})
```
```bash
python -m apt.infer.remote_service --ckpt {CARD_PLACE} --uri apt_control{" --ema" if ema else ""}
bash scripts/finetune.sh --pretrained-ckpt {CARD_PLACE} --vla-name mine --config own_robot
```

`config.json` holds every setting of the run.
"""


def _wanted(datasets: Sequence[str], config: dict) -> str:
    """A table with a row per data set."""
    rules = train_config_from_dict(config)[0].data_configs()
    rows = (f"| {name} | {' | '.join(_shown(data))} |" for name, data in zip(datasets, rules, strict=True))
    return "\n".join(
        ("| as in | cameras | images | arms | time step | answers with |", "|---|---|---|---|---|---|", *rows)
    )


def _shown(data: DataConfig) -> tuple[str, ...]:
    height, width = data.image_hw
    gap = "a time step" if data.sample_state_gaps == 1 else f"{data.sample_state_gaps} time steps"
    unit = data.time_unit.removesuffix("s") if data.time_step == 1 else data.time_unit
    step = "measured" if data.time_step is None else f"{data.time_step:.4g} {unit}"
    return (
        ", ".join(f"{name} (wrist)" if name in data.wrist_cameras else name for name in data.cameras),
        f"{width}x{height}",
        "1" if data.num_arms == 1 else f"1 to {data.num_arms}",
        step,
        f"{data.num_future} poses, {gap} apart",
    )


def _scores(content: dict, config: dict) -> str:
    last, best = content.get("latest_score"), content.get("best_score")
    if last is None:
        return "Not measured in training; say here how often it succeeds, in what, and how that was counted."
    where = "on held-out episodes" if config.get("eval_split") else "in training"
    return (
        f"Loss {where}: {last:.4g}, at its best {best:.4g}. A loss says little of a robot: say here how often it "
        "succeeds, in what, and how that was counted."
    )
