"""What an ablation's cell is worth: in closed loop per setting, against recorded motion, and to its instruction.

``python -m apt.ablate`` calls :func:`evaluate_policy`, or :func:`evaluate_open_loop` where there is no simulator. Each
part is written into the request's folder when it is done, and not done again.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from apt.ablation.evaluation import EvaluationRequest
from apt.ablation.results import Value
from apt.infer.frames import frame_from_episode
from apt.infer.open_loop import evaluate, mean_motion
from apt.infer.planner import TrajPlanner
from apt.infer.policy import Policy
from data_utils.data_loc import find_episodes
from data_utils.datasets import get_dataset_class
from data_utils.files import read_json, write_json
from data_utils.samples.dataset import H5DatasetMapBase
from examples.pickplace.evaluate import ClosedLoopConfig, EvaluateConfig, read_rows
from examples.pickplace.evaluate import evaluate as evaluate_closed_loop
from examples.pickplace.record import RecordedEpisode, read_dataset
from examples.pickplace.scene import Task, load_scene


def evaluate_policy(request: EvaluationRequest) -> dict[str, Value]:
    """:meth:`Judge.in_closed_loop` in the scene that was recorded, per setting of its file."""
    return PickPlaceJudge(request).in_closed_loop()


def evaluate_open_loop(request: EvaluationRequest) -> dict[str, Value]:
    """:meth:`Judge.against_recordings`; needs no simulator."""
    return PickPlaceJudge(request).against_recordings()


class Judge(ABC):
    """Judges the policy of one request; a world says what it asks for.

    Raises:
        ValueError: the request names no demonstrations, or none that were recorded in a world.
    """

    def __init__(self, request: EvaluationRequest) -> None:
        self.request = request
        if request.demos is None:
            raise ValueError("this evaluation needs recorded data: give --demos DIR, or have them recorded")
        folder = request.demos / "test"
        self.recording, episodes = read_dataset(folder)
        if not episodes:
            raise ValueError(f"{folder} was not recorded in a simulated world: it has no dataset.json")
        self.episodes = sorted(episodes.values(), key=lambda episode: episode.file)
        self._policy = functools.cache(
            lambda: Policy.load(request.checkpoint, request.device, use_ema=bool(request.config["ema_enabled"]))
        )

    @abstractmethod
    def settings(self) -> Sequence[str]:
        """Names of what policies are run in."""

    @abstractmethod
    def closed_loop(self, setting: str, common: dict) -> ClosedLoopConfig:
        """The run of a setting, with the arguments that all settings have in common."""

    @abstractmethod
    def instructions(self, episode: RecordedEpisode) -> tuple[str, list[str]]:
        """An instruction for a recorded episode, and others alike, which name other objects that are there."""

    def in_closed_loop(self) -> dict[str, Value]:
        """Outcomes of episodes per setting, and all of :meth:`against_recordings`; needs the simulator.

        Keys: ``SETTING/success``, ``SETTING/named_first``, ``SETTING/wrong_first``, ``SETTING/right_tray``.
        """
        values = self.against_recordings()
        for setting in self.settings():
            values |= self._kept(f"{setting}.json", functools.partial(self._closed_loop, setting), setting)
        return values

    def against_recordings(self) -> dict[str, Value]:
        """On the held-out episodes.

        ``position_cm``: error of the predicted positions, and ``position_ratio``, to that of the training data's mean
        motion. ``language_cm``: how far the path of an episode's first frame moves, on average over its steps, when
        the instruction names another object with the same noise; ``language_ratio``: to how far paths of different
        noise lie apart.
        """
        return self._kept("open_loop.json", self._open_loop) | self._kept("language.json", self._language)

    def _kept(self, name: str, compute: Callable[[], dict[str, Value]], prefix: str = "") -> dict[str, Value]:
        path = self.request.folder / name
        if not path.is_file():
            write_json(path, compute())
        return {f"{prefix}/{name}" if prefix else name: value for name, value in read_json(path).items()}

    def _planner(self, ensemble: int) -> TrajPlanner:
        """A session with noise of its own, so that no part depends on those before it."""
        request = self.request
        return TrajPlanner.of_policy(self._policy(), ensemble, request.seed, request.sizes.denoising_steps)

    def _closed_loop(self, setting: str) -> dict[str, Value]:
        request, sizes = self.request, self.request.sizes
        common = {
            "out": request.folder / setting,
            "ckpt": request.checkpoint,
            "episodes": sizes.episodes,
            "seed": request.seed,
            "execute_steps": sizes.execute_steps,
            "max_steps": sizes.max_steps,
            "ensemble": sizes.ensemble,
            "ema": bool(request.config["ema_enabled"]),
            "denoising_steps": sizes.denoising_steps,
            "device": request.device,
            "image_size": sizes.image_size,
            "overwrite": True,  # a cell that is judged anew
        }
        evaluate_closed_loop(self.closed_loop(setting, common), self._planner(sizes.ensemble))
        rows = read_rows(request.folder / setting)
        return {
            "success": [row["success"] for row in rows],
            "named_first": [row["approached_named"] for row in rows],
            "wrong_first": [int(row["approached"] not in (None, row["object"])) for row in rows],
            "right_tray": [int(row["ended_in"] == row["container"]) for row in rows],
        }

    def _open_loop(self) -> dict[str, float]:
        planner, every = self._planner(ensemble=0), self.request.sizes.every
        mean = mean_motion(self._dataset(planner, "train"), every)
        results = evaluate(planner, self._dataset(planner, "test"), mean, every, None)
        error = results["policy"]["position_m"]
        return {"position_cm": 100 * error, "position_ratio": error / results["mean_motion"]["position_m"]}

    def _language(self) -> dict[str, float]:
        request, planner = self.request, self._planner(ensemble=0)
        dataset = self._dataset(planner, "test")
        changes, spreads = [], []
        for index, episode in enumerate(self.episodes):
            frame = frame_from_episode(dataset.episode(index), 0, dataset.config)

            def paths(instruction: str, frame: dict = frame) -> np.ndarray:
                planner.reset(seed=request.seed)  # the same noise for every instruction
                planner.set_prompt(instruction)
                planner.add_obs_frame(frame)
                return planner.get_action(request.sizes.noise_seeds)[0][:, :, 0, :3, 3]  # (S, Ta, 3)

            own, others = self.instructions(episode)
            named = paths(own)
            first, second = np.triu_indices(len(named), 1)
            spreads.append(_distance(named[first], named[second]))
            changes += [_distance(named, paths(other)) for other in others]
        change, spread = float(np.mean(changes)), float(np.mean(spreads))
        return {"language_cm": 100 * change, "language_ratio": change / max(spread, 1e-9)}

    def _dataset(self, planner: TrajPlanner, part: str) -> H5DatasetMapBase:
        dataset_class = get_dataset_class(self.request.config["dataset_classes"][0])
        files = find_episodes(self.request.demos / part, "record them again")
        return dataset_class(files, config=planner.get_config(), train=False)


class PickPlaceJudge(Judge):
    """Of policies that were trained on a scene of ``examples/pickplace``."""

    def __init__(self, request: EvaluationRequest) -> None:
        super().__init__(request)
        self._scene = load_scene(self.recording["scene"])

    def settings(self) -> Sequence[str]:
        return list(self._scene.settings)

    def closed_loop(self, setting: str, common: dict) -> ClosedLoopConfig:
        recorded = {name: self.recording[name] for name in ("scene", "paraphrases")}
        return EvaluateConfig(setting=setting, **recorded, **common)

    def instructions(self, episode: RecordedEpisode) -> tuple[str, list[str]]:
        def said(name: str) -> str:
            return self._scene.prompts(Task(name, episode.container))[0]

        objects = dict.fromkeys(task.object for task in self._scene.tasks)
        return said(episode.object), [said(other) for other in objects if other != episode.object]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of positions (..., 3)."""
    return float(np.linalg.norm(a - b, axis=-1).mean())
