"""The one path from camera frames and robot states to a :class:`Sample`, shared by training and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data_utils.config import DataConfig
from data_utils.geometry.camera import CameraFrame
from data_utils.geometry.letterbox import Letterbox, fit
from data_utils.geometry.resample import Bracket
from data_utils.samples.augment import NO_AUGMENTATION, ImageAugmentation, draw_augmentation
from data_utils.samples.color_draws import pack_draws
from data_utils.types import ColorDraws, Sample


@dataclass(frozen=True)
class StateTrack:
    """The robot over time, as recorded: poses are the robot's own, before ``ee_offset_z``."""

    times: np.ndarray  # (T,) seconds, not decreasing
    world_from_ee: np.ndarray  # (T, Nee, 4, 4)
    gripper: np.ndarray  # (T, Nee) openness

    def at(self, query: np.ndarray, config: DataConfig) -> np.ndarray:
        """The policy's states (Q, Nee, 17) float32 at times (Q,), interpolated, clamped to the track's ends."""
        bracket = Bracket.of(self.times, query)
        poses = bracket.poses(*(policy_from_robot_ee(end, config) for end in bracket.ends(self.world_from_ee)))
        states = np.empty((*poses.shape[:2], 17), np.float32)
        states[..., :16] = poses.reshape(*poses.shape[:2], 16)
        states[..., 16] = bracket.values(*bracket.ends(self.gripper))
        return states


def policy_from_robot_ee(world_from_ee: np.ndarray, config: DataConfig) -> np.ndarray:
    """Move end-effector origins (..., 4, 4) along their own z axes by ``config.ee_offset_z`` metres."""
    return _shift_along_z(world_from_ee, config.ee_offset_z)


def robot_from_policy_ee(world_from_ee: np.ndarray, config: DataConfig) -> np.ndarray:
    """Inverse of :func:`policy_from_robot_ee`: predicted poses (..., 4, 4) as the robot knows them."""
    return _shift_along_z(world_from_ee, -config.ee_offset_z)


def _shift_along_z(world_from_ee: np.ndarray, metres: float) -> np.ndarray:
    if metres == 0:
        return world_from_ee
    shifted = np.array(world_from_ee)
    shifted[..., :3, 3] += metres * shifted[..., :3, 2]
    return shifted


def sample_step(config: DataConfig, times: np.ndarray) -> float:
    """Seconds that one sampling gap counts: ``config.sample_dt``, else the mean step of the times (T,)."""
    return config.sample_dt if config.sample_dt is not None else float((times[-1] - times[0]) / (len(times) - 1))


def observed_times(config: DataConfig, now: float, step: float) -> np.ndarray:
    """(To,) times of the images, the last one now."""
    return now + np.arange(-config.num_obs + 1, 1) * config.sample_camera_gaps * step


def history_times(config: DataConfig, now: float, step: float) -> np.ndarray:
    """(Th,) times of the past states, the last one now."""
    return now + np.arange(-config.num_history + 1, 1) * config.sample_state_gaps * step


def future_times(config: DataConfig, now: float, step: float, commanded: bool = False) -> np.ndarray:
    """(Ta,) times of the predicted states; a command leads the state by one step, so it is read one step earlier."""
    first = 0 if commanded else 1
    return now + np.arange(first, config.num_future + first) * config.sample_state_gaps * step


def make_sample(
    config: DataConfig,
    frames: Sequence[Mapping[str, CameraFrame]],
    states: StateTrack,
    now: float,
    prompt: str,
    *,
    step: float | None = None,
    targets: StateTrack | None = None,
    commanded: bool = False,
    rng: np.random.Generator | None = None,
    defer_color: bool = False,
    source: str = "",
) -> Sample:
    """Build a sample from observed frames and the robot's track.

    Args:
        config: cameras, arms, times and augmentation.
        frames: To items, oldest first, each with every camera of ``config.cameras``.
        states: the robot's recent states; interpolated for the history and the current pose.
        now: seconds, the current time.
        prompt: the instruction.
        step: seconds per sampling gap; None: :func:`sample_step` of the track.
        targets: where the future states are read from; None when serving.
        commanded: ``targets`` are commands, which lead the state by one step.
        rng: training: draws camera order, reference cameras and augmentation. None: cameras as in the config, each
            arm's first candidate as reference, no augmentation.
        defer_color: pack the drawn changes of colour into the sample instead of applying them
            (:func:`data_utils.samples.device_augment.recolor` does, for a batch, on the device).
        source: file and frame, for messages.
    Returns:
        A sample of Ncam = ``config.num_cameras`` and Nee = ``config.num_arms``; arms the track lacks are padded.
    Raises:
        ValueError: frames or track that do not fit the config.
    """
    _check(config, frames, states)
    if step is None:
        step = sample_step(config, states.times)

    order = list(config.cameras)
    if rng is not None and config.shuffle_cameras:
        order = [order[i] for i in rng.permutation(len(order))]
    references = [_reference_camera(config, arm, rng) for arm in range(config.num_arms)]
    rgb, mask, K, color = _images(config, frames, order, rng, defer_color)
    world_from_cam = np.array([[frame[camera].world_from_cam for camera in order] for frame in frames], np.float32)
    history, future = _states(config, states, targets, now, step, commanded)
    valid_ee = np.arange(config.num_arms) < states.world_from_ee.shape[1]
    return Sample(
        rgb=rgb,
        mask=mask,
        K=K,
        world_from_cam=world_from_cam,
        prompt=prompt,
        world_from_ee=history[-1, :, :16].reshape(-1, 4, 4).copy(),
        world_from_ref=np.array([frames[-1][camera].world_from_cam for camera in references], np.float32),
        history=history,
        valid_ee=valid_ee,
        gripper_mask=valid_ee.copy(),
        timestamp=float(now),
        future=future,
        color=color,
        source=source,
    )


def _check(config: DataConfig, frames: Sequence[Mapping[str, CameraFrame]], states: StateTrack) -> None:
    num_arms = states.world_from_ee.shape[1]
    if num_arms > config.num_arms:
        raise ValueError(f"the robot's track has {num_arms} arms, the config {config.num_arms}; select the arms first")
    if len(frames) != config.num_obs:
        raise ValueError(f"{len(frames)} observed frames were given; the config wants num_obs = {config.num_obs}")
    for frame in frames:
        missing = [camera for camera in config.cameras if camera not in frame]
        if missing:
            raise ValueError(f"camera {missing[0]!r} is missing from the frame; wanted {', '.join(config.cameras)}")


def _images(
    config: DataConfig,
    frames: Sequence[Mapping[str, CameraFrame]],
    order: Sequence[str],
    rng: np.random.Generator | None,
    defer_color: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, ColorDraws | None]:
    """Images (To, Ncam, 3, H, W) uint8 in ``order``, masks (To, Ncam, H, W), K (Ncam, 3, 3), and the changes of colour
    that were left to the device."""
    rgb = np.zeros((config.num_obs, len(order), 3, *config.image_hw), np.uint8)
    mask = np.zeros((config.num_obs, len(order), *config.image_hw), bool)
    K = np.empty((len(order), 3, 3), np.float32)
    augmentations, windows = [], []
    for position, camera in enumerate(order):
        augmentation = NO_AUGMENTATION if rng is None else draw_augmentation(config, camera, rng)
        applied = augmentation.crop_only if defer_color else augmentation
        for number, frame in enumerate(frames):
            box, K[position] = _place(
                frame[camera], config.image_hw, applied, rgb[number, position], mask[number, position]
            )
        augmentations.append(augmentation)
        windows.append((*box.offset, *box.size))
    return rgb, mask, K, pack_draws(augmentations, windows) if defer_color else None


def _states(
    config: DataConfig, states: StateTrack, targets: StateTrack | None, now: float, step: float, commanded: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(Th, Nee, 17) past and (Ta, Nee, 17) coming states, arms padded."""
    past = history_times(config, now, step)
    if targets is None:
        return _pad_arms(states.at(past, config), config.num_arms), None
    coming = future_times(config, now, step, commanded)
    if targets is states:  # one look-up for both
        both = _pad_arms(states.at(np.concatenate([past, coming]), config), config.num_arms)
        return both[: len(past)], both[len(past) :]
    return _pad_arms(states.at(past, config), config.num_arms), _pad_arms(targets.at(coming, config), config.num_arms)


def _reference_camera(config: DataConfig, arm: int, rng: np.random.Generator | None) -> str:
    candidates = config.reference_cameras(arm)
    return candidates[0] if rng is None else candidates[int(rng.integers(len(candidates)))]


def _place(
    frame: CameraFrame,
    image_hw: tuple[int, int],
    augmentation: ImageAugmentation,
    rgb: np.ndarray,
    mask: np.ndarray,
) -> tuple[Letterbox, np.ndarray]:
    """Letterbox one frame into ``rgb`` (3, H', W') and ``mask`` (H', W'), both zero before; how, and K (3, 3)."""
    image, valid, K = frame.rgb, frame.mask, frame.K
    if valid is not None and valid.shape != image.shape[:2]:
        raise ValueError(f"an image of {image.shape[:2]} has a mask of {valid.shape}; they must agree")
    if augmentation.crop is not None:
        top, left, height, width = augmentation.crop_window(image.shape[:2])
        image = image[top : top + height, left : left + width]
        valid = None if valid is None else valid[top : top + height, left : left + width]
        K = K - np.array([[0.0, 0.0, left], [0.0, 0.0, top], [0.0, 0.0, 0.0]])
    box = fit(image.shape[:2], image_hw)
    image = augmentation.recolor(box.resize(image))
    # Written channel by channel straight into the sample: a quarter of the time of a transposed copy.
    cv2.split(image, [channel[box.window] for channel in rgb])
    if valid is None:
        mask[box.window] = True
    else:
        mask[...] = box.mask(valid)
    return box, box.intrinsics(K)


def _pad_arms(states: np.ndarray, num_arms: int) -> np.ndarray:
    """(Q, n, 17) to (Q, num_arms, 17); padded arms rest at the origin with a closed gripper."""
    if states.shape[1] == num_arms:
        return states
    padded = np.zeros((len(states), num_arms, 17), np.float32)
    padded[..., :16] = np.eye(4, dtype=np.float32).reshape(16)
    padded[:, : states.shape[1]] = states
    return padded
