"""What a training run is: ``TrainConfig``, and how a run's own file gives it back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.model.config import VLAConfig
from data_utils.batches.options import SAMPLE_BY, LoaderOptions
from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from data_utils.video import READERS
from train_utils.errors import ConfigError
from train_utils.places import CKPT_DIR, LOG_DIR

TRACKERS, NO_TRACKER = ("tensorboard", "wandb", "trackio"), "none"  # of report_to


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. Every field is a command-line flag of the same name."""

    # -- model
    model: str = "base"
    """Size of the action expert: tiny, small or base."""
    arch: str = "apt"
    """Architecture of the action expert: apt (gated fusion), pi (joint attention with the VLM's own keys and values),
    gr00t (DiT that cross-attends to the VLM) or token_insertion (apt without gates)."""
    objective: str = "ddim"
    """How the expert is trained and sampled: ddim (diffusion, L1 error) or flow (flow matching, squared error)."""
    prediction: str | None = None
    """What the expert's answer means: of ddim epsilon (the noise, as in released models), sample (the clean action) or
    v_prediction, of flow velocity or sample; None: the objective's first."""
    action_scale: tuple[float, ...] | None = None
    """What actions are divided by for the expert, so that noise of deviation 1 is of their size: 3 numbers (translation
    in metres, rotation, gripper) or 10 (each number of an action); None: 1, as in released models."""
    vlm: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Vision-language model: Hugging Face name, local folder, "tiny" (built in, random weights) or "blocks" (small,
    trained on the world of examples/blocks)."""
    vlm_layer_stride: int = 3
    """Features are the VLM's streams after decoder layers 0, s, 2s, ...; their number must be even."""
    vlm_finetune_mode: str = "frozen"
    """frozen, lora or full; stage 0 is always frozen."""
    vlm_lr: float | None = None
    """Learning rate of the VLM's parameters; None: max_lr."""
    vlm_wd: float = 1e-10
    """Weight decay of the VLM's parameters."""
    vlm_param_dtype: str = "fp32"
    """Master weights of trained VLM parameters: fp32, or bf16 to save memory (norms and embeddings stay fp32)."""
    use_gradient_checkpointing: bool = False
    """Recompute the VLM's activations in the backward pass."""
    knowledge_insulation: bool = False
    """No gradient from the action expert into the VLM, which then is frozen or trains on lm_loss_weight alone."""
    lm_loss_weight: float = 0.0
    """Weight of a language-modelling loss that trains the VLM (lora or full, stage 1) on the prompts' tokens beside
    the actions; 0: none."""
    image_text_pairs: str | None = None
    """JSONL file of lines {"image": path relative to the file, "prompt": text, "answer": text}, whose answers the
    language-modelling loss asks for too."""
    image_text_bs: int = 8
    """Image-text pairs per process and step."""
    action_step_embedding: bool = False
    """Tell action tokens which step they are (extension; False is what released models do)."""
    attention_backend: str = "sdpa"
    """Attention of the expert: sdpa or xformers."""
    random_vlm: bool = False
    """Random VLM weights from its configuration alone, to measure speed at full size without a download."""

    # -- data
    dataset_classes: tuple[str, ...] = ("PickPlaceCan",)
    """Datasets: names (data_utils/datasets.py), package.module:Class, or paths of YAML files (docs/data.md)."""
    dataset_weights: tuple[float, ...] | None = None
    """Share of each dataset whatever its size; None: every episode alike."""
    sample_multiplex: int = 1
    """Times that an epoch visits each episode (or frame), without dataset_weights."""
    sample_by: str = "episode"
    """episode: an epoch goes through all episodes and draws a frame of each; frame: through all frames."""
    max_bad_fraction: float = 0.01
    """Share of the episodes that may be unusable before the run stops; those few are skipped and listed."""
    image_size: int | None = None
    """Side of the square that frames are letterboxed to; None: as each dataset says."""
    bs: int = 64
    """Samples per process and step."""
    workers: int = 8
    """Loader processes per rank."""
    persistent_workers: bool = True
    pin_memory: bool = True
    prefetch_factor: int = 4
    dataloader_timeout: int = 300
    """Seconds to wait for a batch before a loader process counts as hanging; 0: for ever."""
    video_reader: str = "decord"
    """Library that decodes videos: decord, torchcodec or pyav."""
    decode_threads: int = 0
    """Threads per loader process that decode the cameras of a sample side by side; 0: none."""
    robot_pose_aug: bool = False
    """Noise on proprioceptive inputs."""
    camera_view_dropout: float = 0.0
    """Probability with which a sample of two or more cameras loses one."""
    noise_samples_per_obs: int = 1
    """Diffusion draws that share one VLM pass and one pass of the VL stream; 1 is what the paper does."""
    augment: bool = True
    """Image augmentation as each dataset says; False: none."""
    cache_vlm_features: str | None = None
    """Folder on a local disk that keeps what a frozen VLM answers: a sample that comes again costs no VLM pass. None:
    no cache. Samples are told apart by VLM, pixels, order of the cameras and prompt (which stage 0 does not read), so
    augment must be False. It pays where frames come again often and reading is faster than the VLM: Qwen3-VL-2B's
    features of two cameras are 2.6 MB in stage 0, 7 MB in stage 1. All processes of a machine share the folder."""
    cache_limit_gb: float = 100.0
    """Size (10^9 bytes) at which nothing more is added to the cache; what is in it stays in use."""

    # -- held-out episodes
    eval_split: float = 0.0
    """Share of the episodes that is kept apart to evaluate the policy on, chosen by the names of their files below
    their location; 0: none."""
    eval_every: int = 1000
    """Steps between two evaluations on the held-out episodes; 0: one at the end alone."""
    eval_samples: int = 256
    """Frames that an evaluation looks at, of all processes; always the same."""

    # -- optimisation
    fp16: bool = True
    """bfloat16 autocast (the name is the released configurations')."""
    use_compile: bool = False
    """torch.compile the expert."""
    grad_clip: float = 1.0
    max_lr: float = 1e-4
    wd: float = 1e-2
    num_warmup: int = 10000
    """Steps of linear warm-up; the learning rate is constant afterwards."""
    num_decay: int = 0
    """Last steps of max_iterations, over which the learning rate falls linearly to nothing; 0: it stays constant."""
    gradient_accumulation_steps: int = 1
    ema_enabled: bool = False
    ema_start: int = 400000
    ema_decay: float = 0.9995
    max_iterations: int = 600000

    # -- back-end
    backend: str = "ddp"
    """How processes work together: ddp or deepspeed."""
    ds_zero: int = 2
    """Under deepspeed, what is sharded: 2, gradients and optimizer state; 3, parameters as well."""

    # -- the run
    train_stage: int = 1
    """0: VA prior (paper's Stage 1). 1: VLA (paper's Stage 2)."""
    load_from_va: bool = False
    """pretrained_ckpt is a VA prior: expand it into a VLA."""
    pretrained_ckpt: str | None = None
    """Start from this run's name or .pt file, at iteration 0."""
    name: str = "debug"
    """Name of the run: its folder under ckpt_dir and log_dir."""
    resume: bool = False
    """Continue the run of this name."""
    seed: int = 0
    log_interval: int = 100
    save_interval: int = 100000
    save_latest_interval: int = 1000
    vis_interval: int = 5000
    """Steps between trajectory and gate pictures; 0: none."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where numbers and pictures go beside metrics.jsonl: tensorboard, wandb, trackio, several of them, or none."""
    log_dir: str = LOG_DIR
    ckpt_dir: str = CKPT_DIR
    device: str = "auto"
    """auto (CUDA when there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        require(self.train_stage in (0, 1), f"train_stage is {self.train_stage}; wanted 0 or 1")
        for field in ("bs", "gradient_accumulation_steps", "max_iterations", "log_interval", "sample_multiplex",
                      "save_interval", "save_latest_interval", "prefetch_factor", "noise_samples_per_obs",
                      "image_text_bs", "eval_samples"):  # fmt: skip
            require(getattr(self, field) >= 1, f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("workers", "num_warmup", "num_decay", "ema_start", "vis_interval", "dataloader_timeout",
                      "decode_threads", "eval_every"):  # fmt: skip
            require(getattr(self, field) >= 0, f"{field} is {getattr(self, field)}; it must not be negative")
        require(0 <= self.camera_view_dropout <= 1, f"camera_view_dropout is {self.camera_view_dropout}; wanted 0 to 1")
        require(0 <= self.eval_split < 1, f"eval_split is {self.eval_split}; wanted 0 (none) to below 1")
        require(0 <= self.max_bad_fraction <= 1, f"max_bad_fraction is {self.max_bad_fraction}; wanted 0 to 1")
        for field, known in (("sample_by", SAMPLE_BY), ("video_reader", READERS)):
            require(getattr(self, field) in known, f"{field} is {getattr(self, field)!r}; wanted {' or '.join(known)}")
        require(
            self.vlm_param_dtype in ("fp32", "bf16"),
            f"vlm_param_dtype is {self.vlm_param_dtype!r}; wanted fp32 or bf16",
        )
        known = (*TRACKERS, NO_TRACKER)
        for name in self.report_to:
            require(name in known, f"report_to is {name!r}; wanted {', '.join(known)}")
        alone = NO_TRACKER not in self.report_to or len(self.report_to) == 1
        require(bool(self.report_to) and alone, f"report_to {NO_TRACKER} goes with no other")
        require(self.backend in ("ddp", "deepspeed"), f"backend is {self.backend!r}; wanted ddp or deepspeed")
        require(self.ds_zero in (2, 3), f"ds_zero is {self.ds_zero}; wanted 2 or 3")
        require(
            not (self.use_compile and self.backend == "deepspeed" and self.ds_zero == 3),
            "use_compile does not work with ds_zero 3, whose parameters come and go; use --ds-zero 2 or --backend ddp",
        )
        require(
            not (self.vlm_param_dtype == "bf16" and self.backend == "deepspeed" and self.ds_zero == 3),
            "vlm_param_dtype bf16 does not work with ds_zero 3, which wants one data type for all that trains; use "
            "fp32 (ZeRO-3 shards the master weights), or --ds-zero 2",
        )
        require(self.device in ("auto", "cpu", "cuda"), f"device is {self.device!r}; wanted auto, cpu or cuda")
        require(bool(self.dataset_classes), "dataset_classes is empty; name at least one dataset")
        require(
            self.dataset_weights is None or len(self.dataset_weights) == len(self.dataset_classes),
            f"dataset_weights has {len(self.dataset_weights or ())} entries for {len(self.dataset_classes)} datasets",
        )
        require(
            self.dataset_weights is None or all(weight > 0 for weight in self.dataset_weights),
            "dataset_weights must all be positive",
        )
        require(
            not self.load_from_va or self.train_stage == 1,
            "load_from_va expands a VA prior into a VLA and belongs to train_stage 1",
        )
        require(
            not self.load_from_va or self.pretrained_ckpt is not None or self.resume,
            "load_from_va needs pretrained_ckpt: the VA prior's run name or .pt file",
        )
        require(bool(self.name) and "/" not in self.name, f"name is {self.name!r}; wanted a plain folder name")
        require(self.cache_limit_gb > 0, f"cache_limit_gb is {self.cache_limit_gb}; it must be positive")
        try:
            self.vla_config()
            for name in self.dataset_classes:
                self._rules(name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        require(
            self.image_text_pairs is None or self.lm_loss_weight > 0,
            "image_text_pairs are trained on by the language-modelling loss; give lm_loss_weight above 0",
        )
        if self.cache_vlm_features is not None:
            self._check_cache(require)

    def _check_cache(self, require: Callable[[bool, str], None]) -> None:
        """A cached feature must be what the VLM would compute in this run, of an input that comes again."""
        name = "cache_vlm_features"
        mode = self.vla_config().vlm_mode
        require(mode == "frozen", f"{name} needs a VLM that stays as it is; vlm_finetune_mode is {mode!r}, not frozen")
        augmented = [
            dataset
            for dataset, data in zip(self.dataset_classes, self.data_configs(), strict=True)
            if data.aug_crop or data.aug_color or data.aug_blur or data.aug_background
        ]
        require(
            not augmented,
            f"{name} needs images that come again, and {', '.join(augmented)} augments them at random; give --augment "
            "False",
        )
        require(
            self.camera_view_dropout == 0,
            f"{name} keeps features of all cameras together; camera_view_dropout is {self.camera_view_dropout}, not 0",
        )
        require(
            not (self.backend == "deepspeed" and self.ds_zero == 3),
            f"{name} does not work with ds_zero 3, whose processes must run the VLM all together, also those that find "
            "everything stored; use --ds-zero 2 or --backend ddp",
        )

    @property
    def run_dir(self) -> Path:
        """Folder of this run's checkpoints."""
        return Path(self.ckpt_dir) / self.name

    def vla_config(self) -> VLAConfig:
        """The policy to build, with history and future lengths of the datasets."""
        data = self._rules(self.dataset_classes[0])
        return VLAConfig(
            model=self.model,
            arch=self.arch,
            objective=self.objective,
            prediction=self.prediction,
            action_scale=self.action_scale,
            vlm=self.vlm,
            vlm_layer_stride=self.vlm_layer_stride,
            vlm_mode=self.vlm_finetune_mode if self.train_stage == 1 else "frozen",
            train_stage=self.train_stage,
            num_history=data.num_history,
            num_future=data.num_future,
            action_step_embedding=self.action_step_embedding,
            attention_backend=self.attention_backend,
            gradient_checkpointing=self.use_gradient_checkpointing,
            knowledge_insulation=self.knowledge_insulation,
            lm_loss_weight=self.lm_loss_weight,
        )

    def data_configs(self) -> list[DataConfig]:
        """Sampling rules of each dataset, with this run's image size and augmentation."""
        changes: dict = {} if self.image_size is None else {"image_hw": (self.image_size, self.image_size)}
        if not self.augment:
            changes |= {name: False for name in ("aug_crop", "aug_color", "aug_blur", "aug_background")}
        return [dataclasses.replace(self._rules(name), **changes) for name in self.dataset_classes]

    def _rules(self, name: str) -> DataConfig:
        """Sampling rules of a dataset, by its class. Raises ``ValueError`` for one that is not known."""
        return get_dataset_class(name).config

    def loader_options(self) -> LoaderOptions:
        """How batches of this run are put together."""
        return LoaderOptions(
            batch_size=self.bs,
            workers=self.workers,
            seed=self.seed,
            weights=self.dataset_weights,
            multiplex=self.sample_multiplex,
            sample_by=self.sample_by,
            timeout=self.dataloader_timeout,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            prefetch_factor=self.prefetch_factor,
        )

    def to_dict(self) -> dict:
        """JSON-able. Beside the fields, ``data``: the sampling rules of each dataset, so that a policy does not depend
        on what becomes of their classes."""
        rules = {name: data.to_dict() for name, data in zip(self.dataset_classes, self.data_configs(), strict=True)}
        return {**{name: value for name, value in dataclasses.asdict(self).items() if name != "data"}, "data": rules}


@dataclass(frozen=True)
class TrainedConfig(TrainConfig):
    """A run's configuration as its checkpoint has it, which goes by the sampling rules of that time."""

    data: Mapping[str, DataConfig] = dataclasses.field(default_factory=dict)
    """By dataset."""

    def _rules(self, name: str) -> DataConfig:
        return self.data[name] if name in self.data else super()._rules(name)

    def changed_rules(self) -> list[str]:
        """How today's classes of the same names differ, as ``Blocks: sample_dt 0.1, today 0.5``."""
        found = []
        for name, before in self.data.items():
            with contextlib.suppress(ValueError):  # a class that is not there differs in nothing
                now = get_dataset_class(name).config
                changed = changed_rules(before, now)
                found += [f"{name}: {field} {old}, today {new}" for field, (old, new) in changed.items()]
        return found


def changed_rules(before: DataConfig, now: DataConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of sampling rules that differ: values before and now. Of image size and augmentation, a run's own
    configuration decides."""
    names = [field.name for field in dataclasses.fields(DataConfig)]
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in names}
    own = {name for name in names if name.startswith("aug_")} | {"image_hw"}
    return {name: pair for name, pair in pairs.items() if name not in own and pair[0] != pair[1]}


def train_config_from_dict(values: dict) -> tuple[TrainConfig, list[str]]:
    """A configuration from a run's JSON, and the fields unknown to this version, which are ignored.

    Fields that are missing take defaults. Raises :class:`ConfigError`.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known - {"data"})
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known}
    for field in dataclasses.fields(TrainConfig):
        wanted = (int, float) if isinstance(field.default, float) else type(field.default)
        if field.name in kept and field.default is not None and not isinstance(kept[field.name], wanted):
            raise ConfigError(f"{field.name} is {kept[field.name]!r} in the run's JSON; wanted {field.type}")
    if "data" not in values:
        return TrainConfig(**kept), unknown
    try:
        data = {name: DataConfig.from_dict(rules) for name, rules in values["data"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"data in the run's JSON is of no use: {error}") from error
    return TrainedConfig(**kept, data=data), unknown
