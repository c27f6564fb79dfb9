"""How an episode becomes samples: which cameras, which arms, which times, which augmentation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Sampling rules of one kind of robot or dataset; JSON-able, kept beside every checkpoint.

    Raises ``ValueError`` from the constructor where fields contradict each other.
    """

    cameras: tuple[str, ...]
    """Camera names in the episode file; the first is the main camera."""
    wrist_cameras: tuple[str, ...] = ()
    """Cameras that move with an arm: never cropped by augmentation."""
    ee_indices: tuple[int, ...] = (0,)
    """Which of the file's end-effectors are arms of this policy (a file's ``ee_indices`` attribute overrides)."""
    ee_ref_cams: tuple[tuple[str, ...], ...] = ()
    """Per arm, the cameras its reference camera is drawn from; () means the main camera."""
    record_dt: float | None = None
    """Seconds between stored frames; None: the file's timestamps count."""
    sample_dt: float | None = None
    """Unit of the sampling gaps in seconds; None: the mean step of the stored timestamps."""
    num_obs: int = 1
    """To, observed frames (the VLM sees the newest)."""
    num_history: int = 1
    """Th, past states, the current one included."""
    num_future: int = 32
    """Ta, predicted states."""
    sample_camera_gaps: int = 4
    """Steps of ``sample_dt`` between observed frames."""
    sample_state_gaps: int = 1
    """Steps of ``sample_dt`` between history and future states."""
    image_hw: tuple[int, int] = (256, 256)
    """Height and width that frames are letterboxed to."""
    ee_offset_z: float = 0.0
    """Metres by which the stored end-effector origin is moved along its own z axis."""
    strip_scene_prefix: bool = False
    """Drop LIBERO's ``..._SCENEn`` prefix from the prompt."""
    shuffle_cameras: bool = True
    """Draw the camera order per training sample."""
    aug_crop: bool = True
    """Geometric crop to 95-100% on non-wrist cameras (training only)."""
    aug_color: bool = True
    """Brightness, contrast, saturation and gamma (training only)."""
    aug_blur: bool = True
    """Blur with probability 1/7 (training only)."""
    aug_background: bool = False
    """Background tint and patches (training only)."""

    def __post_init__(self) -> None:
        for name in ("cameras", "wrist_cameras", "ee_indices", "image_hw"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "ee_ref_cams", tuple(tuple(names) for names in self.ee_ref_cams))
        if not self.cameras:
            raise ValueError("DataConfig.cameras is empty; name at least one camera, the main one first")
        if len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"DataConfig.cameras names a camera twice: {self.cameras}")
        if not self.ee_indices:
            raise ValueError("DataConfig.ee_indices is empty; name at least one end-effector")
        if self.ee_ref_cams and len(self.ee_ref_cams) != len(self.ee_indices):
            raise ValueError(
                f"DataConfig.ee_ref_cams has {len(self.ee_ref_cams)} entries for {len(self.ee_indices)} arms; "
                "give one tuple of camera names per arm"
            )
        for name in {*self.wrist_cameras, *(camera for arm in self.ee_ref_cams for camera in arm)}:
            if name not in self.cameras:
                raise ValueError(f"DataConfig names camera {name!r}, which is not among cameras {self.cameras}")
        for name in ("num_obs", "num_history", "num_future", "sample_camera_gaps", "sample_state_gaps"):
            if getattr(self, name) < 1:
                raise ValueError(f"DataConfig.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("record_dt", "sample_dt"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"DataConfig.{name} is {getattr(self, name)}; it must be positive or None")

    @property
    def num_cameras(self) -> int:
        return len(self.cameras)

    @property
    def num_arms(self) -> int:
        return len(self.ee_indices)

    @property
    def time_step(self) -> float | None:
        """Unit of the gaps, in the frames' clock; None: measured from the frames."""
        return self.sample_dt if self.sample_dt is not None else self.record_dt

    @property
    def time_unit(self) -> str:
        """Simulated sets count control steps, by a ``sample_dt`` of 1 (docs/data.md); all others seconds."""
        return "control steps" if self.sample_dt == 1.0 and self.record_dt is None else "seconds"

    def reference_cameras(self, arm: int) -> tuple[str, ...]:
        """Candidates for the reference camera of arm ``arm`` (an index into ``ee_indices``)."""
        return self.ee_ref_cams[arm] if self.ee_ref_cams else self.cameras[:1]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "DataConfig":
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown DataConfig field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)
