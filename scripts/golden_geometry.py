"""Check times, images, samples and the ensembler against recorded numbers of the released data code.

Sizes and counts come from the archives. What they do not hold is fixed by their layout: the camera order of the two
sample archives, and that images are letterboxed to squares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from apt.model.vlm import token_coordinates
from data_utils.config import DataConfig
from data_utils.geometry.letterbox import fit, norm_xy
from data_utils.geometry.resample import interpolate_poses, interpolate_values, nearest_index
from data_utils.h5io import Episode
from data_utils.samples.dataset import H5DatasetMapBase
from infer_utils.trajectory_ensembler import TrajectoryEnsembler

Report = Callable[[str, float, float], None]  # name, largest error, tolerance

TOLERANCE = 1e-5  # of a quantity's largest magnitude
COLOR_TOLERANCE = 1e-4  # absolute, colours in [0, 1]
EXACT = 0.0
ENSEMBLE_SIZE = 4
SAMPLE_CAMERAS = {
    "episode_samples": ("agentview", "eye_in_hand"),
    "episode_samples_measured": ("eye_in_hand", "agentview"),
}


def check_geometry(folder: Path, report: Report) -> None:
    """Report every quantity of every archive in ``folder``.

    Raises:
        FileNotFoundError: an archive is missing.
        KeyError: an archive lacks an array.
    """
    _check_resample(folder, report)
    _check_nearest(folder, report)
    for name in ("letterbox", "letterbox_fractional"):
        _check_letterbox(folder, name, report)
    if not (folder / "episode.h5").is_file():
        raise FileNotFoundError(folder / "episode.h5")
    _check_samples(folder, "episode_samples", folder / "episode.h5", report)
    with tempfile.TemporaryDirectory() as scratch:
        measured = _without_desired(folder / "episode.h5", Path(scratch) / "measured.h5")
        _check_samples(folder, "episode_samples_measured", measured, report)
    for name in ("ensemble", "ensemble_dense"):
        _check_ensemble(folder, name, report)


class _Worst:
    """The largest error of each quantity over the cases of one archive."""

    def __init__(self) -> None:
        self.errors: dict[str, tuple[float, float]] = {}

    def compare(self, name: str, got, want: np.ndarray, tolerance: float, relative: bool = True) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            error = float("inf")
        else:
            scale = np.abs(want).max() if relative and want.any() else 1.0
            error = float(np.abs(got - want).max() / scale)
        # np.maximum keeps a NaN, which must fail.
        worst = float(np.maximum(error, self.errors.get(name, (0.0, tolerance))[0]))
        self.errors[name] = (worst, tolerance)

    def tell(self, archive: str, report: Report) -> None:
        for name, (error, tolerance) in self.errors.items():
            report(f"{archive}.{name}", error, tolerance)


def _load(folder: Path, name: str) -> dict[str, np.ndarray]:
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(path)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _cases(archive: dict[str, np.ndarray], pattern: str) -> Iterator[int]:
    """0, 1, ... while the archive has the array ``pattern`` names."""
    number = 0
    while pattern.format(number) in archive:
        yield number
        number += 1
    if number == 0:
        raise KeyError(pattern.format(0))


def _check_resample(folder: Path, report: Report) -> None:
    archive, worst = _load(folder, "resample"), _Worst()
    times, query = archive["train_time"], archive["query_time"]
    worst.compare("pose", interpolate_poses(times, archive["train_pose"], query), archive["pose"], TOLERANCE)
    gripper = interpolate_values(times, archive["train_gripper"], query)
    worst.compare("gripper", gripper, archive["gripper"], TOLERANCE)
    worst.tell("resample", report)


def _check_nearest(folder: Path, report: Report) -> None:
    archive, worst = _load(folder, "nearest"), _Worst()
    worst.compare("index", nearest_index(archive["train"], archive["query"]), archive["index"], EXACT)
    worst.tell("nearest", report)


def _check_letterbox(folder: Path, name: str, report: Report) -> None:
    archive, worst = _load(folder, name), _Worst()
    for i in _cases(archive, "hw{}"):
        want_K, corners, tokens = archive[f"K_out{i}"], archive[f"norm_xy_corners{i}"], archive[f"norm_xy_tokens{i}"]
        # The last corner's coordinates, taken back to pixels, are the output's last column.
        side = int(np.rint(corners[0, -1] * want_K[0, 0] + want_K[0, 2])) + 1
        grid = int(np.rint(np.sqrt(len(tokens))))
        box = fit(tuple(archive[f"hw{i}"].tolist()), (side, side))
        K, mask = box.intrinsics(archive[f"K_in{i}"]), box.mask()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        worst.compare("K", K, want_K, TOLERANCE)
        bounds = [[rows[0], rows[-1]], [columns[0], columns[-1]]]
        worst.compare("valid_rows_cols", bounds, archive[f"valid_rows_cols{i}"], EXACT)
        got_corners = norm_xy(K, (side, side))[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        worst.compare("norm_xy_corners", got_corners, corners, TOLERANCE)
        got_tokens = token_coordinates(torch.from_numpy(K), grid, grid, side // grid).numpy()
        worst.compare("norm_xy_tokens", got_tokens, tokens, TOLERANCE)
    worst.tell(name, report)


def _check_samples(folder: Path, name: str, episode: Path, report: Report) -> None:
    archive, worst = _load(folder, name), _Worst()
    for j in _cases(archive, "{}.args"):
        frame, record_dt, sample_dt, gaps = archive[f"{j}.args"].tolist()
        cameras = SAMPLE_CAMERAS[name]
        config = DataConfig(
            cameras=cameras,
            record_dt=None if record_dt < 0 else record_dt,
            sample_dt=None if sample_dt < 0 else sample_dt,
            sample_state_gaps=int(gaps),
            num_obs=len(archive[f"{j}.cam_poses"]),
            num_history=len(archive[f"{j}.history"]),
            num_future=len(archive[f"{j}.future"]),
            image_hw=_image_hw(episode, cameras[0], archive[f"{j}.K"][0]),
        )
        dataset = H5DatasetMapBase([episode], config, train=False)
        sample = dataset.sample(0, np.random.default_rng(0), frame=int(frame))
        quantities = {
            "history": sample.history,
            "future": sample.future,
            "ee_poses": sample.world_from_ee[None],
            "cam_poses": sample.world_from_cam,
            "action_ref_pose": sample.world_from_ref,
            "K": sample.K,
            "time": sample.timestamp,
        }
        for key, got in quantities.items():
            worst.compare(key, got, archive[f"{j}.{key}"], TOLERANCE)
        worst.compare("valid", sample.valid_ee, archive[f"{j}.valid"], EXACT)
        mean = (sample.rgb / 255.0).mean((-2, -1))  # (To, Ncam, 3)
        worst.compare("rgb_mean", mean, archive[f"{j}.rgb_mean"], COLOR_TOLERANCE, relative=False)
    worst.tell(name, report)


def _image_hw(episode: Path, camera: str, K_out: np.ndarray) -> tuple[int, int]:
    """The square the images were letterboxed to: its side is that of the image's longer side after resizing."""
    with Episode(episode, [camera]) as file:
        K_in, (height, width, _) = file.K(camera, 0), file.rgb(camera, 0).shape
    side = max(round(height * K_out[1, 1] / K_in[1, 1]), round(width * K_out[0, 0] / K_in[0, 0]))
    return side, side


def _without_desired(episode: Path, copy: Path) -> Path:
    copy.write_bytes(episode.read_bytes())
    with h5py.File(copy, "r+") as file:
        for key in ("ee_pose_desired", "gripper_desired"):
            if key in file:
                del file[key]
    return copy


def _check_ensemble(folder: Path, name: str, report: Report) -> None:
    archive, worst = _load(folder, name), _Worst()
    ensembler = TrajectoryEnsembler(ENSEMBLE_SIZE)
    for k in _cases(archive, "{}.time"):
        times, position, rotation = (archive[f"{k}.{key}"] for key in ("time", "pos", "rot"))
        world_from_ee = np.tile(np.eye(4), (len(times), 1, 1, 1))  # (T, 1, 4, 4)
        world_from_ee[:, 0, :3, :3], world_from_ee[:, 0, :3, 3] = rotation, position
        blended, _ = ensembler.add(times, world_from_ee, np.zeros((len(times), 1)))
        worst.compare("pos", blended[:, 0, :3, 3], archive[f"{k}.pos_out"], TOLERANCE)
        worst.compare("rot", blended[:, 0, :3, :3], archive[f"{k}.rot_out"], TOLERANCE)
    worst.tell(name, report)
