"""What an ablation's cell is worth: in closed loop per setting, against recorded motion, and to its instruction.

``python -m apt.ablate`` calls :func:`evaluate_policy`, or :func:`evaluate_open_loop` where there is no simulator. Each
part is written into the request's folder when it is done, and not done again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from apt.ablation.evaluation import EvaluationRequest
from apt.infer.frames import frame_from_episode
from apt.infer.open_loop import evaluate, mean_motion
from apt.infer.planner import TrajPlanner
from apt.infer.policy import Policy
from data_utils.data_loc import find_episodes
from data_utils.datasets import get_dataset_class
from data_utils.files import read_json, write_json
from data_utils.samples.dataset import H5DatasetMapBase
from examples.pickplace.evaluate import EvaluateConfig
from examples.pickplace.evaluate import evaluate as evaluate_closed_loop
from examples.pickplace.record import RecordedEpisode, read_dataset
from examples.pickplace.scene import Scene, Task, load_scene


def evaluate_policy(request: EvaluationRequest) -> dict[str, float]:
    """Closed-loop rates per setting of the scene that was recorded, and all of :func:`evaluate_open_loop`.

    Needs the simulator. Keys: ``SETTING/success``, ``SETTING/named_first``, ``SETTING/episodes``.
    """
    policy = _loaded_once(request)
    values = _open_loop_values(request, policy)
    for setting in _scene(request).settings:
        values |= _kept(
            request.folder / f"{setting}.json", functools.partial(_closed_loop, request, policy, setting), setting
        )
    return values


def evaluate_open_loop(request: EvaluationRequest) -> dict[str, float]:
    """Without a simulator, on the held-out episodes.

    ``position_cm``: error of the predicted positions, and ``position_ratio``, to that of the training data's mean
    motion. ``language_cm``: how far the path of an episode's first frame moves, on average over its steps, when the
    instruction names another object with the same noise; ``language_ratio``: to how far paths of different noise lie
    apart.
    """
    return _open_loop_values(request, _loaded_once(request))


def _open_loop_values(request: EvaluationRequest, policy: Callable[[], Policy]) -> dict[str, float]:
    values = _kept(request.folder / "open_loop.json", functools.partial(_open_loop, request, policy))
    return values | _kept(request.folder / "language.json", functools.partial(_language, request, policy))


def _loaded_once(request: EvaluationRequest) -> Callable[[], Policy]:
    ema = bool(request.config["ema_enabled"])
    return functools.cache(lambda: Policy.load(request.checkpoint, request.device, use_ema=ema))


def _kept(path: Path, compute: Callable[[], dict[str, float]], prefix: str = "") -> dict[str, float]:
    if not path.is_file():
        write_json(path, compute())
    return {f"{prefix}/{name}" if prefix else name: value for name, value in read_json(path).items()}


def _planner(request: EvaluationRequest, policy: Policy, ensemble: int) -> TrajPlanner:
    """A session with noise of its own, so that no part depends on those before it."""
    return TrajPlanner.of_policy(policy, ensemble, request.seed, request.sizes.denoising_steps)


def _closed_loop(request: EvaluationRequest, policy: Callable[[], Policy], setting: str) -> dict[str, float]:
    sizes, recorded = request.sizes, _recorded(request)[0]
    config = EvaluateConfig(
        out=request.folder / setting,
        ckpt=request.checkpoint,
        episodes=sizes.episodes,
        seed=request.seed,
        execute_steps=sizes.execute_steps,
        max_steps=sizes.max_steps,
        ensemble=sizes.ensemble,
        ema=bool(request.config["ema_enabled"]),
        denoising_steps=sizes.denoising_steps,
        device=request.device,
        image_size=sizes.image_size,
        scene=recorded["scene"],
        setting=setting,
        paraphrases=recorded["paraphrases"],
        overwrite=True,  # a cell that is judged anew
    )
    summary = evaluate_closed_loop(config, _planner(request, policy(), sizes.ensemble))
    return {
        "success": summary["success"]["rate"],
        "named_first": summary["approached_named"]["rate"],
        "episodes": summary["episodes"],
    }


def _open_loop(request: EvaluationRequest, policy: Callable[[], Policy]) -> dict[str, float]:
    planner = _planner(request, policy(), ensemble=0)
    mean = mean_motion(_dataset(request, planner, "train"), request.sizes.every)
    results = evaluate(planner, _dataset(request, planner, "test"), mean, request.sizes.every, None)
    error = results["policy"]["position_m"]
    return {"position_cm": 100 * error, "position_ratio": error / results["mean_motion"]["position_m"]}


def _language(request: EvaluationRequest, policy: Callable[[], Policy]) -> dict[str, float]:
    planner = _planner(request, policy(), ensemble=0)
    dataset, scene = _dataset(request, planner, "test"), _scene(request)
    recorded = _recorded(request)[1]
    objects = list(dict.fromkeys(task.object for task in scene.tasks))
    changes, spreads = [], []
    for index, episode in enumerate(recorded):
        frame = frame_from_episode(dataset.episode(index), 0, dataset.config)

        def paths(name: str, frame: dict = frame, episode: RecordedEpisode = episode) -> np.ndarray:
            planner.reset(seed=request.seed)  # the same noise for every instruction
            planner.set_prompt(scene.prompts(Task(name, episode.container))[0])
            planner.add_obs_frame(frame)
            return planner.get_action(request.sizes.noise_seeds)[0][:, :, 0, :3, 3]  # (S, Ta, 3)

        named = paths(episode.object)
        first, second = np.triu_indices(len(named), 1)
        spreads.append(_distance(named[first], named[second]))
        changes += [_distance(named, paths(other)) for other in objects if other != episode.object]
    change, spread = float(np.mean(changes)), float(np.mean(spreads))
    return {"language_cm": 100 * change, "language_ratio": change / max(spread, 1e-9)}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of positions (..., 3)."""
    return float(np.linalg.norm(a - b, axis=-1).mean())


def _dataset(request: EvaluationRequest, planner: TrajPlanner, part: str) -> H5DatasetMapBase:
    dataset_class = get_dataset_class(request.config["dataset_classes"][0])
    return dataset_class(
        find_episodes(_demos(request) / part, "record them again"), config=planner.get_config(), train=False
    )


def _demos(request: EvaluationRequest) -> Path:
    if request.demos is None:
        raise ValueError("the pickplace evaluations need recorded data: give --demos DIR, or have them recorded")
    return request.demos


def _recorded(request: EvaluationRequest) -> tuple[dict, list[RecordedEpisode]]:
    """Settings and episodes of the held-out recording, in the order of its files."""
    folder = _demos(request) / "test"
    settings, episodes = read_dataset(folder)
    if not episodes:
        raise ValueError(f"{folder} was not recorded by examples.pickplace.record: it has no dataset.json")
    return settings, sorted(episodes.values(), key=lambda episode: episode.file)


def _scene(request: EvaluationRequest) -> Scene:
    return load_scene(_recorded(request)[0]["scene"])
