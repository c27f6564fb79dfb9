"""Open-loop evaluation: the planner's chunks against what recorded episodes did next.

``python -m apt.infer.open_loop --ckpt F --episodes DIR --out DIR2`` feeds every k-th recorded frame to ``TrajPlanner``
and compares with the recording: beside the policy, the same errors for the training data's mean motion and for standing
still, and a picture of both paths on every camera.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from apt.checkpoint import CheckpointError, checkpoint_sha256
from apt.infer.frames import frame_from_episode
from apt.model.action_transform import action_to_state, state_errors, state_to_action
from apt.model.pretrained import CheckpointMismatch
from data_utils.cli import check_writable
from data_utils.config import DataConfig
from data_utils.data_loc import find_episodes
from data_utils.datasets import dataset_class_or_plain
from data_utils.drawing.captions import FAINT, TEXT, text_band
from data_utils.drawing.paths import PREDICTED, RECORDED
from data_utils.errors import DataError
from data_utils.files import write_json
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.samples.split import is_held_out
from infer_utils.draw_traj import COMPARISON_LEGEND, draw_on_cameras

if TYPE_CHECKING:
    from apt.infer.planner import TrajPlanner


SEED = 0  # of the noise


def mean_motion(dataset: H5DatasetMapBase, every: int = 4) -> torch.Tensor:
    """Mean future action (Ta, Nee, 10) over the dataset's frames, in the policy's own action space."""
    total, count = 0.0, 0
    rng = np.random.default_rng(0)
    for index in range(len(dataset)):
        for frame in range(0, dataset.episode_length(index), every):
            total = total + _actions(dataset.sample(index, rng, frame))
            count += 1
    return total / count


def _actions(sample) -> torch.Tensor:
    ee, ref = torch.from_numpy(sample.world_from_ee), torch.from_numpy(sample.world_from_ref)
    return state_to_action(torch.from_numpy(sample.future), ee, ref)


def errors(predicted: np.ndarray, recorded: np.ndarray) -> dict[str, float]:
    """Mean position error (m), rotation error (degrees), share of wrong gripper states; states (T, Nee, 17)."""
    found = state_errors(torch.from_numpy(predicted), torch.from_numpy(recorded))
    names = ("position_m", "rotation_deg", "gripper_wrong")
    return {name: float(error.double().mean()) for name, error in zip(names, found, strict=True)}


def evaluate(
    planner: TrajPlanner, dataset: H5DatasetMapBase, mean_action: torch.Tensor, every: int, out: Path | None
) -> dict[str, dict[str, float]]:
    """Mean errors of ``policy``, ``mean_motion`` and ``standing_still`` over the dataset's frames.

    Args:
        planner: without ensembling.
        dataset: recorded episodes, not for training (fixed camera order).
        mean_action: (Ta, Nee, 10).
        every: frames between two queries.
        out: folder for pictures, one per episode; None: none.
    """
    rows: dict[str, list[dict[str, float]]] = {"policy": [], "mean_motion": [], "standing_still": []}
    rng = np.random.default_rng(0)
    for index in range(len(dataset)):
        episode = dataset.episode(index)
        planner.set_prompt(dataset.sample(index, rng, 0).prompt)
        planner.reset()
        tiles = []
        for frame in range(0, dataset.episode_length(index), every):
            sample = dataset.sample(index, rng, frame)
            planner.add_obs_frame(frame_from_episode(episode, frame, dataset.config))
            poses, grippers, _, _ = planner.get_action()
            policy = np.concatenate([poses[0].reshape(*poses.shape[1:3], 16), grippers[0][..., None]], axis=-1)
            ee, ref = torch.from_numpy(sample.world_from_ee), torch.from_numpy(sample.world_from_ref)
            still = np.repeat(sample.history[-1:], len(sample.future), axis=0)
            guesses = {
                "policy": policy,
                "mean_motion": action_to_state(mean_action, ee, ref).numpy(),
                "standing_still": still,
            }
            arms = sample.valid_ee
            for name, guess in guesses.items():
                rows[name].append(errors(guess[:, arms[: guess.shape[1]]], sample.future[:, arms]))
            futures = [(sample.future, RECORDED), (policy, PREDICTED)]
            tiles.append(draw_on_cameras(sample.rgb[-1], sample.K, sample.world_from_cam[-1], futures))
        if out is not None:
            image = _picture(tiles, dataset.config.cameras, f"“{sample.prompt}” · {episode.path.name}")
            cv2.imwrite(str(out / f"episode_{index:03d}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return {name: {key: float(np.mean([row[key] for row in r])) for key in r[0]} for name, r in rows.items()}


def _picture(tiles: Sequence[np.ndarray], cameras: Sequence[str], title: str) -> np.ndarray:
    """Up to four moments of an episode, time to the right and cameras down, of tiles (H, Ncam * W, 3)."""
    shown = [tiles[i] for i in np.linspace(0, len(tiles) - 1, min(4, len(tiles))).astype(int)]
    by_moment = [np.split(tile, len(cameras), axis=1) for tile in shown]
    width = sum(moment[0].shape[1] for moment in by_moment)
    parts = [text_band(width, [(title, 14, TEXT), *COMPARISON_LEGEND])]
    for row, camera in enumerate(cameras):
        images = np.concatenate([moment[row] for moment in by_moment], axis=1)
        parts += [text_band(width, [(f"{camera}, later to the right", 12, FAINT)]), images]
    return np.concatenate(parts, axis=0)


def trained_on(recorded: H5DatasetMapBase, training: H5DatasetMapBase, held_out_share: float) -> int:
    """How many of the recorded episodes are among those for training, the held-out ones (``eval_split``) left out."""
    used = {
        os.path.realpath(training.paths[index])
        for index in range(len(training))
        if not (held_out_share and is_held_out(training.paths.name(index), held_out_share))
    }
    return sum(os.path.realpath(recorded.paths[index]) in used for index in range(len(recorded)))


def _training_episodes(
    dataset_class: type[H5DatasetMapBase], folder: Path | None, config: DataConfig
) -> H5DatasetMapBase:
    try:
        return dataset_class(
            None if folder is None else find_episodes(folder, "record or convert some first"),
            config=config,
            train=False,
        )
    except DataError as error:
        if folder is not None or error.rule != "location":
            raise
        raise DataError(f"{error}; or name the episodes with --train-episodes DIR", "location") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt", required=True, type=Path, help="a ckpt_*.pt with its configuration beside it, or an exported folder"
    )
    parser.add_argument("--episodes", required=True, type=Path, help="recorded episodes to predict, a folder or a file")
    parser.add_argument(
        "--train-episodes",
        type=Path,
        metavar="DIR",
        help="episodes the mean motion is taken from, a folder or a file (default: data_loc's)",
    )
    parser.add_argument("--out", type=Path, help="folder for open_loop.json and pictures")
    parser.add_argument("--every", type=int, default=8, help="frames between two queries (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the policy's)")
    parser.add_argument("--sampler", help="ddim, or dpm for few steps; of flow matching, euler (default: the policy's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    args = parser.parse_args(argv)
    try:
        if args.every < 1:
            raise ValueError(f"--every is {args.every}; wanted the frames between two queries, 1 or more")
        if args.out is not None:
            check_writable(args.out, "--out")
        from apt.infer.planner import TrajPlanner  # seconds of imports, which --help need not wait for

        planner = TrajPlanner(
            args.ckpt, args.device, ensemble=0, use_ema=args.ema, seed=SEED, steps=args.steps, sampler=args.sampler
        )
        config: DataConfig = planner.get_config()
        dataset_class = dataset_class_or_plain(planner.train_config.dataset_classes[0])
        recorded = dataset_class(
            find_episodes(args.episodes, "record or convert some first"), config=config, train=False
        )
        training = _training_episodes(dataset_class, args.train_episodes, config)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
        known = trained_on(recorded, training, planner.train_config.eval_split)
        results = evaluate(planner, recorded, mean_motion(training), args.every, args.out)
    except (CheckpointError, CheckpointMismatch, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"open loop on {len(recorded)} recorded episodes, mean over {config.num_future} future steps")
    for name, values in results.items():
        print(
            f"  {name.replace('_', ' '):<15} position {100 * values['position_m']:6.2f} cm   rotation "
            f"{values['rotation_deg']:6.2f} deg   gripper wrong {values['gripper_wrong']:6.1%}"
        )
    ratio = results["policy"]["position_m"] / results["mean_motion"]["position_m"]
    print(f"  policy / mean motion: position error ratio {ratio:.2f}")
    if known:
        print(f"  {known} of these episodes are among those for training: errors on others are larger")
    if args.out is not None:
        provenance = {
            "ckpt": str(args.ckpt),
            "sha256": checkpoint_sha256(args.ckpt),
            "ema": args.ema,
            "sampling": planner.sampling,
            "seed": SEED,
            "every": args.every,
            "episodes": [recorded.paths.name(index) for index in range(len(recorded))],
            "among_training": known,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "diffusers")},
        }
        write_json(args.out / "open_loop.json", {**results, "position_ratio": ratio, **provenance})
    return 0


if __name__ == "__main__":
    sys.exit(main())
