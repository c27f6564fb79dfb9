"""A mapping applied to one episode of a recording: columns to an :class:`EpisodeData`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_utils.convert.mapping import Arm, Camera, Desired, Keep, Mapping
from data_utils.convert.runner import Skipped
from data_utils.convert.undistorted import Undistorted
from data_utils.convert.values import Evaluator, Recording
from data_utils.episodes import schema
from data_utils.h5io import CameraData, EpisodeData, VideoFrames

CV_FROM_GL = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL cameras look along -z with y up


def assemble(
    mapping: Mapping, recording: Recording, calibration: Path, mapping_file: Path, attributes: dict
) -> EpisodeData:
    """One episode in this library's terms.

    Args:
        mapping: what the columns mean.
        recording: the episode.
        calibration: folder of the calibration files that the mapping names.
        mapping_file: where the mapping was read from.
        attributes: where the episode comes from, kept in its file.
    Raises:
        Skipped: a ``keep`` rule leaves the episode out.
        DataError: a column that is missing or whose values are not what the mapping says.
    """
    evaluate = Evaluator(recording, calibration, mapping_file)
    for rule in mapping.keep:
        _check_kept(rule, recording, evaluate)
    arms = [ArmTrack(arm, index, evaluate, recording.length) for index, arm in enumerate(mapping.arms)]
    poses = by_name_and_number(mapping.arms, arms)
    desired = mapping.arms[0].desired is not None
    times = _times(mapping, recording, evaluate)
    for index, arm in enumerate(arms):
        evaluate.check_speed(arm.world_from_ee, times, f"arms[{index}]")
        told = mapping.arms[index]
        if told.pose.form == "joints":
            evaluate.check_joints(told.pose, times, f"arms[{index}]", told.desired.pose if desired else None)
    if evaluate.remarks:
        attributes = attributes | {schema.REMARKS_ATTR: "\n".join(evaluate.remarks)}
    episode = EpisodeData(
        timestamp=times,
        world_from_ee=np.stack([arm.world_from_ee for arm in arms], axis=1),
        gripper=np.stack([arm.gripper for arm in arms], axis=1),
        prompts=_prompts(mapping, recording, evaluate),
        cameras={
            name: camera_data(f"cameras.{name}", camera, recording, evaluate, poses)
            for name, camera in mapping.cameras.items()
        },
        world_from_ee_desired=np.stack([arm.desired_pose for arm in arms], axis=1) if desired else None,
        gripper_desired=np.stack([arm.desired_gripper for arm in arms], axis=1) if desired else None,
        subtasks=_subtasks(mapping, recording, evaluate),
        ee_indices=mapping.ee_indices,
        video_root=recording.video_root,
        attributes=attributes,
    )
    step = _step(mapping, recording, evaluate)
    return episode if step == 1 else _thinned(episode, step)


def _step(mapping: Mapping, recording: Recording, evaluate: Evaluator) -> int:
    """Every how many frames one is kept."""
    if mapping.rate is None:
        return 1
    fps = recording.fps if recording.fps is not None else 1 / mapping.time_step
    step = round(fps / mapping.rate)
    if step < 1 or abs(fps / step - mapping.rate) > 0.01 * mapping.rate:
        raise evaluate.fault(f"is recorded at {fps:g} frames a second, which cannot become {mapping.rate:g}", "time")
    return step


def _thinned(episode: EpisodeData, step: int) -> EpisodeData:
    """Every ``step``-th frame; sub-tasks begin at the first frame kept of theirs."""
    T, kept = len(episode.timestamp), slice(None, None, step)

    def thin(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[kept]

    def thin_camera(camera: CameraData) -> CameraData:
        frames = camera.frames
        if isinstance(frames, VideoFrames):
            frames = VideoFrames(frames.path, frames.times[kept])
        else:
            frames = _EveryNth(frames, step)
        pose = camera.world_from_cam[kept] if camera.world_from_cam.ndim == 3 else camera.world_from_cam
        return CameraData(pose, camera.K[kept] if camera.K.ndim == 3 else camera.K, frames)

    starts: dict[int, str] = {}  # of sub-tasks that begin between the same two frames, the last counts
    for start, text in episode.subtasks:
        if -(-start // step) * step < T:
            starts[-(-start // step)] = text
    return dataclasses.replace(
        episode,
        timestamp=episode.timestamp[kept],
        world_from_ee=episode.world_from_ee[kept],
        gripper=episode.gripper[kept],
        cameras={name: thin_camera(camera) for name, camera in episode.cameras.items()},
        world_from_ee_desired=thin(episode.world_from_ee_desired),
        gripper_desired=thin(episode.gripper_desired),
        subtasks=list(starts.items()),
    )


class _EveryNth(Sequence):
    """Every ``step``-th of frames that are decoded when asked for."""

    def __init__(self, frames: Sequence[np.ndarray], step: int) -> None:
        self._frames, self._indices = frames, range(0, len(frames), step)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._frames[self._indices[index]]


def _check_kept(rule: Keep, recording: Recording, evaluate: Evaluator) -> None:
    evaluate.require(rule.column, "keep")
    found = recording.first(rule.column)
    if rule.equals is not None and found != rule.equals:
        raise Skipped(f"{rule.column} is not {rule.equals!r}")
    if rule.not_equals is not None and found == rule.not_equals:
        raise Skipped(f"{rule.column} is {rule.not_equals!r}")


def _times(mapping: Mapping, recording: Recording, evaluate: Evaluator) -> np.ndarray:
    """(T,) seconds."""
    if mapping.time_step is not None:
        return np.arange(recording.length) * mapping.time_step
    evaluate.require(mapping.timestamp, "timestamp")
    times = recording.numbers(mapping.timestamp)[:, 0]
    if (late := np.flatnonzero(~(np.diff(times) > 0))).size:
        frame = int(late[0])
        what = f"column {mapping.timestamp!r} does not increase from frame {frame} to {frame + 1}"
        raise evaluate.fault(f"{what}: {times[frame]:g}, {times[frame + 1]:g}", "time")
    return times


class ArmTrack:
    """Poses (T, 4, 4) and openness (T,) of one end-effector, and those it was told."""

    def __init__(self, arm: Arm, index: int, evaluate: Evaluator, length: int) -> None:
        self._arm, self._evaluate, self._length = arm, evaluate, length
        where = f"arms[{index}]"
        self.world_from_ee = self._pose(arm, where)
        self.gripper = self._openness(arm, where)
        if arm.desired is not None:
            self.desired_pose = self._pose(arm.desired, f"{where}.desired")
            self.desired_gripper = self._openness(arm.desired, f"{where}.desired")

    def _pose(self, source: Arm | Desired, where: str) -> np.ndarray:
        arm, evaluate = self._arm, self._evaluate
        poses = evaluate.pose(source.pose, f"{where}.pose")
        if arm.world_from_base is not None:
            poses = evaluate.pose(arm.world_from_base, f"{where}.world_from_base") @ poses
        if arm.tip_from_ee is not None:
            poses = poses @ evaluate.pose(arm.tip_from_ee, f"{where}.tip_from_ee")
        return np.broadcast_to(poses, (self._length, 4, 4))

    def _openness(self, source: Arm | Desired, where: str) -> np.ndarray:
        if source.gripper is None:  # an end-effector without one, as the format wants it
            among_joints = self._evaluate.openness_among_joints(source.pose, f"{where}.pose")
            return np.zeros(self._length) if among_joints is None else among_joints
        return self._evaluate.openness(source.gripper, f"{where}.gripper")


def by_name_and_number(arms: Sequence[Arm], tracks: Sequence[ArmTrack]) -> dict[str | int, np.ndarray]:
    """``world_from_ee`` (T, 4, 4) of every arm: mappings call them by name, camera rigs count them."""
    poses = [track.world_from_ee for track in tracks]
    return {**dict(enumerate(poses)), **{arm.name: pose for arm, pose in zip(arms, poses, strict=True)}}


def camera_data(
    where: str, camera: Camera, recording: Recording, evaluate: Evaluator, arms: dict[str | int, np.ndarray]
) -> CameraData:
    """Frames and calibration of a camera, which messages call ``where``; ``arms`` as :func:`by_name_and_number` has
    them. Raises ``DataError``."""
    evaluate.require(camera.frames, f"{where}.frames")
    if camera.rig is not None:
        return _rig_data(where, camera, recording, evaluate, arms)
    if camera.world_from_cam is not None:
        poses = _in_world(where, camera, evaluate, "world_from_cam")
    else:
        world_from_ee = arms[camera.on_arm]
        if camera.ee_from_cam is not None:
            ee_from_cam = evaluate.pose(camera.ee_from_cam, f"{where}.ee_from_cam")
        else:
            at_first_frame = _in_world(where, camera, evaluate, "world_from_cam_at_first_frame")[:1]
            ee_from_cam = np.linalg.inv(world_from_ee[:1]) @ at_first_frame
        poses = world_from_ee @ ee_from_cam
    if camera.axes == "opengl":
        poses = poses @ CV_FROM_GL
    return CameraData(
        world_from_cam=poses[0] if (poses == poses[0]).all() else poses,
        K=evaluate.intrinsics(camera.K, camera.frames, f"{where}.K"),
        frames=recording.frames(camera.frames, camera.flip_rows),
    )


def _rig_data(
    where: str, camera: Camera, recording: Recording, evaluate: Evaluator, arms: dict[str | int, np.ndarray]
) -> CameraData:
    """As a camera rig has it; the frames of a lens that distorts are undistorted."""
    calibrated = evaluate.rig_camera(camera.rig, f"{where}.rig")
    width, height = recording.frame_size(camera.frames)
    K = calibrated.pinhole((height, width))
    numbered = [pose for number, pose in arms.items() if isinstance(number, int)]
    poses = calibrated.pose(np.stack(numbered, axis=1))
    if calibrated.on_arm is None and camera.world_from_base is not None:
        poses = evaluate.pose(camera.world_from_base, f"{where}.world_from_base") @ poses
    frames = recording.frames(camera.frames, camera.flip_rows)
    if calibrated.distortion.any():
        frames = Undistorted(frames, calibrated, recording.video_root)
    stands = poses.ndim == 3 and (poses == poses[0]).all()
    return CameraData(poses[0] if stands else poses, K, frames)


def _in_world(where: str, camera: Camera, evaluate: Evaluator, field: str) -> np.ndarray:
    poses = evaluate.pose(getattr(camera, field), f"{where}.{field}")
    if camera.world_from_base is None:
        return poses
    return evaluate.pose(camera.world_from_base, f"{where}.world_from_base") @ poses


def _prompts(mapping: Mapping, recording: Recording, evaluate: Evaluator) -> list[str]:
    """The instructions, without empty ones and repetitions."""
    found: list[str] = []
    for prompt in mapping.prompts:
        if prompt.task:
            found.append(recording.task())
        elif prompt.column is not None:
            evaluate.require(prompt.column, "prompts")
            found.append(recording.texts(prompt.column)[0])
        elif prompt.episode is not None:
            texts = recording.of_episode(prompt.episode)
            found += [texts] if isinstance(texts, str) else list(texts)
        else:
            found.append(prompt.text)
    prompts = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not prompts:
        raise evaluate.fault("has no instruction: all its prompts are empty", "prompt")
    return prompts


def _subtasks(mapping: Mapping, recording: Recording, evaluate: Evaluator) -> list[tuple[int, str]]:
    """First frame and text of each run of equal texts; empty texts are no sub-task."""
    if mapping.subtasks is None:
        return []
    evaluate.require(mapping.subtasks, "subtasks")
    texts = recording.texts(mapping.subtasks)
    starts = [frame for frame in range(len(texts)) if frame == 0 or texts[frame] != texts[frame - 1]]
    return [(frame, texts[frame]) for frame in starts if texts[frame].strip()]
