"""The configurations that have a name: what ``--config`` takes."""

from __future__ import annotations

import dataclasses

from apt.configs import TrainConfig
from train_utils.errors import ConfigError

LIBERO_SUITES = ("LiberoSpatial", "LiberoObject", "LiberoGoal", "Libero10")
INTERN_A1 = ("InternA1Franka", "InternA1Lift2", "InternA1Genie1", "InternA1SplitAloha")

UNIT_SCALE = (0.1, 0.3, 1.0)
"""Of ``action_scale``: makes the motions of a chunk about as large as noise."""

# What learns best, where TrainConfig's own defaults are the released models': of all presets.
_OWN = {"prediction": "sample", "action_scale": UNIT_SCALE, "action_step_embedding": True}


def _finetune(**changes) -> TrainConfig:
    return TrainConfig(**_OWN, **{"num_warmup": 2000, **changes})


CONFIGS: dict[str, TrainConfig] = {
    "debug": TrainConfig(
        model="tiny",
        vlm="tiny",
        vlm_layer_stride=1,
        image_size=128,
        bs=4,
        workers=0,
        fp16=False,
        num_warmup=10,
        max_iterations=20,
        log_interval=1,
        save_interval=10,
        save_latest_interval=5,
        vis_interval=10,
        **_OWN,
    ),
    # The world of examples/blocks on two CPU cores; examples/blocks/train.sh runs it.
    "blocks": TrainConfig(
        model="tiny",
        vlm="blocks",
        vlm_layer_stride=1,
        dataset_classes=("Blocks",),
        sample_multiplex=1000,
        augment=False,
        robot_pose_aug=True,
        bs=16,
        noise_samples_per_obs=4,
        workers=0,
        max_lr=1e-3,
        num_warmup=100,
        num_decay=1000,
        ema_enabled=True,
        ema_start=0,
        ema_decay=0.998,
        max_iterations=1600,
        eval_split=0.03,
        eval_every=500,
        log_interval=50,
        save_latest_interval=250,
        vis_interval=1000,
        **_OWN,
    ),
    "pretrain": TrainConfig(
        dataset_classes=("Droid", "AgibotWorldAlpha", *INTERN_A1, "InternM1Franka"),
        dataset_weights=(10.0, 10.0, 2.0, 2.0, 2.0, 2.0, 2.0),
        **_OWN,
    ),
    "finetune_pp": _finetune(dataset_classes=("PickPlaceCan",), sample_multiplex=1000),
    # Tens to hundreds of episodes of one's own robot, named by --dataset_classes; some are held out to judge by.
    "own_robot": _finetune(
        dataset_classes=("PickPlaceCan",),
        sample_multiplex=100,
        bs=32,
        num_warmup=500,
        num_decay=8000,
        max_iterations=10000,
        eval_split=0.1,
        eval_every=500,
        save_latest_interval=500,
    ),
    # As finetune_pp, for the cells of an ablation; vlm_lr counts where the VLM trains.
    "ablate": _finetune(dataset_classes=("PickPlaceCan",), sample_multiplex=1000, max_iterations=20000, vlm_lr=1e-5),
    # The same at the size of minutes on two CPU cores, with the built-in random VLM: shows that a grid runs.
    "ablate_cpu": TrainConfig(
        model="tiny",
        vlm="tiny",
        vlm_layer_stride=1,
        sample_multiplex=1000,
        image_size=96,
        augment=False,
        bs=8,
        noise_samples_per_obs=2,
        workers=0,
        fp16=False,
        max_lr=1e-3,
        num_warmup=20,
        ema_enabled=True,
        ema_start=0,
        ema_decay=0.98,
        max_iterations=300,
        log_interval=20,
        save_latest_interval=60,
        eval_every=30,
        eval_samples=64,
        vis_interval=0,
        **_OWN,
    ),
    "finetune_libero": _finetune(dataset_classes=LIBERO_SUITES, sample_multiplex=1000, max_iterations=70000),
    "finetune_aloha_pp": _finetune(dataset_classes=("AlohaPickPlace",), sample_multiplex=1000),
    "finetune_aloha_pp_storage": _finetune(
        dataset_classes=("AlohaPickPlace", "AlohaTableStorage"), sample_multiplex=1000
    ),
    "finetune_aloha_pp_clutter": _finetune(dataset_classes=("AlohaPickPlaceClutter",), sample_multiplex=1000),
}
CONFIGS.update(
    {
        f"finetune_libero_{suite.removeprefix('Libero').lower()}": dataclasses.replace(
            CONFIGS["finetune_libero"], dataset_classes=(suite,)
        )
        for suite in LIBERO_SUITES
    }
)


def get_config(name: str) -> TrainConfig:
    """A preset by name. Raises :class:`ConfigError`."""
    if name not in CONFIGS:
        raise ConfigError(f"unknown config {name!r}; choose from {', '.join(sorted(CONFIGS))}")
    return CONFIGS[name]
