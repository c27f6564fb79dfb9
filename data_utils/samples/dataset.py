"""Map-style datasets over episode files: item i is one frame drawn from episode i."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_utils.config import DataConfig
from data_utils.data_loc import Location, locate
from data_utils.errors import DataError, UnusableEpisode
from data_utils.geometry.camera import CameraFrame
from data_utils.geometry.letterbox import norm_xy
from data_utils.geometry.resample import nearest_index
from data_utils.h5io import Episode
from data_utils.index.episode_list import list_episodes
from data_utils.samples.observation import StateTrack, make_sample, observed_times, sample_step
from data_utils.types import Sample
from data_utils.video import READERS, VideoCache

SCENE_PREFIX = re.compile(r"^\w*_SCENE\d+[_ ]+")


class H5DatasetMapBase:
    """Episodes of one kind; subclasses set ``name`` and ``config``.

    Episodes that the index knows to be faulty are left out and listed in :attr:`faults`.

    Args:
        paths: episode files, or locations of them; None: where ``data_loc`` says this class's data is.
        config: replaces the class's own.
        train: draw camera order, reference camera and augmentation; else both are fixed and nothing is augmented.
        train_stage: 0 (VA prior) reads the first half of the sorted episodes where the class asks for it, 1 (VLA) all.
        seed: of ``__getitem__``'s generator.
        defer_color: leave augmentation of colours to the device (``device_augment.recolored``).
        video_reader: library that decodes videos, one of ``data_utils.video.READERS``.
        decode_threads: threads per process that decode the cameras of one sample side by side; 0 or 1: none.
    Raises:
        DataError: no episodes, or none that can be used.
    """

    name: str = ""
    config: DataConfig
    half_in_stage0: bool = False
    """Whether the VA prior is trained on the first half of the episodes only."""
    max_open_episodes: int = 64
    """Kept open per worker: seven datasets stay well below the usual limit of 1024 files."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike] | Sequence[Location] | None = None,
        config: DataConfig | None = None,
        train: bool = True,
        train_stage: int = 1,
        seed: int = 0,
        defer_color: bool = False,
        video_reader: str = "decord",
        decode_threads: int = 0,
    ) -> None:
        self.name = type(self).name or type(self).__name__
        self.config = config if config is not None else type(self).config
        self.train = train
        self.seed = seed
        self.defer_color = defer_color
        if train_stage not in (0, 1):
            raise ValueError(f"train_stage is {train_stage}; wanted 0 (VA prior) or 1 (VLA)")
        if video_reader not in READERS:
            raise ValueError(f"video_reader is {video_reader!r}; wanted one of {', '.join(READERS)}")
        if decode_threads < 0:
            raise ValueError(f"decode_threads is {decode_threads}; it must not be negative")
        self.video_reader = video_reader
        self.decode_threads = decode_threads
        source = self.locations() if paths is None else list(paths)
        if not source:
            raise DataError(f"dataset {self.name} was given no episode files; name at least one", "location")
        self.paths = list_episodes(source, self.config.cameras, train_stage == 0 and self.half_in_stage0)
        if not self.paths:
            first = self.faults[0]
            count = len(self.faults)
            raise DataError(
                f"dataset {self.name}: none of {count} episode(s) can be used; the first: {first.message}", first.rule
            )
        self._reset_worker_state()

    @classmethod
    def locations(cls) -> list[Location]:
        """Where the episodes are. Raises ``DataError`` where that is not known, or none are there."""
        return locate(cls.name or cls.__name__)

    def episode_length(self, index: int) -> int:
        """Frames of episode ``index``."""
        return int(self.lengths[index])

    @property
    def faults(self) -> list[UnusableEpisode]:
        """Episodes that are left out, and why."""
        return self.paths.faults

    @property
    def lengths(self) -> np.ndarray:
        """(len,) int32: frames of every episode, by the index."""
        return self.paths.lengths

    def __len__(self) -> int:
        return len(self.paths)

    def split(self, is_apart: Callable[[str], bool]) -> tuple["H5DatasetMapBase", "H5DatasetMapBase"]:
        """This dataset without, and with nothing but, the episodes that ``is_apart`` says of their names below their
        locations. The second is not for training (``train`` False); either may be empty. Faults stay with the first."""
        apart = np.array([is_apart(self.paths.name(index)) for index in range(len(self))], bool)
        rest, chosen = copy.copy(self), copy.copy(self)
        rest.paths, chosen.paths, chosen.train = self.paths.only(~apart), self.paths.only(apart), False
        rest.paths.faults = self.paths.faults
        for part in (rest, chosen):
            part._reset_worker_state()
        return rest, chosen

    def sample(self, index: int, rng: np.random.Generator, frame: int | None = None) -> Sample:
        """One sample of episode ``index`` (uint8 images, no coordinate maps).

        Args:
            index: episode, 0 to len - 1.
            rng: draws the frame and, in training, everything else that is drawn.
            frame: the current frame; None: drawn uniformly.
        Raises:
            DataError: the file is damaged; names file, key and frame.
            IndexError: no such episode or frame.
        """
        episode = self._episode(index)
        config = self.config
        if frame is None:
            frame = int(rng.integers(len(episode)))
        elif not 0 <= frame < self.lengths[index]:
            raise IndexError(f"{episode.path} has frames 0 to {self.lengths[index] - 1}, not {frame}")
        elif frame >= len(episode):
            what = f"has {len(episode)} frames, {self.lengths[index]} when it was indexed"
            raise DataError(f"{episode.path}: {what}; run python -m data_utils.index --full on its folder")
        draw = rng if self.train else None

        times = episode.times(config.record_dt)
        now = float(times[frame])
        step = sample_step(config, times)
        arms = self._arms(episode)
        states = StateTrack(times, episode.world_from_ee[:, arms], episode.gripper[:, arms])
        targets = states
        if episode.has_desired:
            targets = StateTrack(times, episode.world_from_ee_desired[:, arms], episode.gripper_desired[:, arms])
        observed = [frame]
        if config.num_obs > 1:
            observed = [*nearest_index(times, observed_times(config, now, step)[:-1]).tolist(), frame]
        observed_frames = self._observed_frames(episode, observed)
        try:
            return make_sample(
                config,
                observed_frames,
                states,
                now,
                self._prompt(episode, frame, draw),
                step=step,
                targets=targets,
                commanded=episode.has_desired,
                rng=draw,
                defer_color=self.defer_color and self.train,
                source=f"{episode.path} frame {frame}",
            )
        except ValueError as error:
            raise DataError(f"{episode.path} frame {frame}: {error}") from error

    def episode(self, index: int) -> Episode:
        """The open file of episode ``index``; it belongs to the dataset and may be closed by later reads."""
        return self._episode(index)

    def __getitem__(self, index: int) -> dict:
        """The sample as a dictionary of numpy arrays and a text; see :func:`sample_to_dict`.

        The frame is drawn by a generator of this worker process, seeded by the dataset's seed, the rank and the worker.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"dataset {self.name} has {len(self)} episodes, not {index}")
        return sample_to_dict(self.sample(index % len(self), self._generator()))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_owner": None, "_open_episodes": None, "_rng": None, "_threads": None}

    # -- per process --------------------------------------------------------------------------------------------

    def _reset_worker_state(self) -> None:
        self._owner = os.getpid()
        self._open_episodes: OrderedDict[int, Episode] = OrderedDict()
        self._rng: np.random.Generator | None = None
        self._threads: ThreadPoolExecutor | None = None

    def _generator(self) -> np.random.Generator:
        self._claim()
        if self._rng is None:
            from torch.utils.data import get_worker_info  # seconds, which whoever wants the rules need not wait

            worker = get_worker_info()
            # A worker's torch seed differs by worker and by epoch; torchrun tells the rank.
            self._rng = np.random.default_rng(
                (self.seed, int(os.environ.get("RANK", "0")), 0 if worker is None else worker.seed)
            )
        return self._rng

    def _claim(self) -> None:
        """HDF5 handles and generators must not be shared with the process this one was forked from."""
        if self._owner != os.getpid():
            self._reset_worker_state()

    def _open(self, index: int) -> Episode:
        videos = _process_videos(os.getpid(), self.video_reader)
        path, root = self.paths[index], self.paths.video_root(index)
        return Episode(path, self.config.cameras, root, videos, trusted=self.paths.is_unchanged(index))

    def _episode(self, index: int) -> Episode:
        self._claim()
        if index in self._open_episodes:
            self._open_episodes.move_to_end(index)
            return self._open_episodes[index]
        episode = self._open(index)
        self._check_clock(episode)
        self._open_episodes[index] = episode
        if len(self._open_episodes) > self.max_open_episodes:
            self._open_episodes.popitem(last=False)[1].close()
        return episode

    def _check_clock(self, episode: Episode) -> None:
        """Raises :class:`DataError` where a chunk ends before the next frame: every target is the pose of now."""
        config, times = self.config, episode.times(self.config.record_dt)
        if config.sample_dt is None or len(times) < 2:
            return
        span = config.num_future * config.sample_state_gaps * config.sample_dt
        usual = float(np.median(np.diff(times)))
        if span < usual:
            what = f"has a frame every {usual:.4g} s in the median, and the {config.num_future} steps that dataset"
            why = f"{self.name} looks ahead end after {span:.4g} s; are timestamp and sample_dt both in seconds?"
            raise DataError(f"{episode.path}: {what} {why}", "time")

    # -- reading ------------------------------------------------------------------------------------------------

    def _observed_frames(self, episode: Episode, observed: list[int]) -> list[dict[str, CameraFrame]]:
        cameras = self.config.cameras

        def read(camera: str) -> list[CameraFrame]:
            return [episode.camera_frame(camera, frame) for frame in observed]

        if self.decode_threads < 2:
            tracks = [read(camera) for camera in cameras]
        else:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.decode_threads, "decode")
            tracks = list(self._threads.map(read, cameras))
        return [dict(zip(cameras, frames, strict=True)) for frames in zip(*tracks, strict=True)]

    def _arms(self, episode: Episode) -> list[int]:
        arms = episode.ee_indices if episode.ee_indices is not None else self.config.ee_indices
        if len(arms) > self.config.num_arms:
            raise DataError(
                f"{episode.path}: attribute ee_indices names {len(arms)} end-effectors; "
                f"dataset {self.name} has {self.config.num_arms} arms"
            )
        if max(arms) >= episode.num_ee:
            raise DataError(
                f"{episode.path}: ee_pose has {episode.num_ee} end-effectors; dataset {self.name} wants {arms}"
            )
        return list(arms)

    def _prompt(self, episode: Episode, frame: int, rng: np.random.Generator | None) -> str:
        text = episode.prompt(rng, frame)
        return SCENE_PREFIX.sub("", text) if self.config.strip_scene_prefix else text


def sample_to_dict(sample: Sample) -> dict:
    """The public form of a sample: numpy arrays and a text.

    ``obs_rgbs`` (To, Ncam, 3, H, W) float32 in [0, 1], ``obs_masks`` (To, Ncam, H, W) bool, ``obs_norm_xys``
    (To, Ncam, 2, H, W) float32, ``obs_extrinsics`` (To, Ncam, 4, 4) world_from_cam, ``K`` (Ncam, 3, 3),
    ``prompt_text``, ``current_ee_pose`` (Nee, 4, 4), ``action_ref_pose`` (Nee, 4, 4), ``history_ee_states``
    (Th, Nee, 17), ``gt_future_ee_states`` (Ta, Nee, 17), ``timestamps`` (), ``valid_ee_mask`` (Nee,),
    ``gripper_mask`` (Nee,).

    Raises:
        ValueError: the sample has no future (it was made for serving).
    """
    if sample.future is None:
        raise ValueError("a sample made for serving has no future states and cannot become a training item")
    hw = sample.rgb.shape[-2:]
    coordinates = norm_xy(sample.K, hw)  # (Ncam, 2, H, W)
    return {
        "obs_rgbs": sample.rgb.astype(np.float32) / 255.0,
        "obs_masks": sample.mask,
        "obs_norm_xys": np.repeat(coordinates[None], len(sample.rgb), axis=0),
        "obs_extrinsics": sample.world_from_cam,
        "K": sample.K,
        "prompt_text": sample.prompt,
        "current_ee_pose": sample.world_from_ee,
        "action_ref_pose": sample.world_from_ref,
        "history_ee_states": sample.history,
        "gt_future_ee_states": sample.future,
        "timestamps": np.float64(sample.timestamp),
        "valid_ee_mask": sample.valid_ee,
        "gripper_mask": sample.gripper_mask,
    }


@functools.cache
def _process_videos(pid: int, reader: str) -> VideoCache:
    """The open decoders that all datasets of a process share; ``pid`` gives a forked one its own."""
    return VideoCache(reader)
