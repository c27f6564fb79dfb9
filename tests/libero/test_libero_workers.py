"""Episodes over processes that may die: every one is reported once, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.errors import SceneError
from examples.libero.rollout import EpisodeKey, EpisodeResult
from examples.libero.tasks import LiberoTask
from examples.libero.workers import Episode, EpisodeRunner, Outcome, RunStopped, _TaskQueue, run_episodes

REPOSITORY = Path(__file__).parents[2]


def episodes(tasks: int, trials: int) -> list[Episode]:
    return [
        Episode(EpisodeKey("libero_object", task, number), LiberoTask("libero_object", task, f"t{task}", Path()), "", 9)
        for task in range(tasks)
        for number in range(trials)
    ]


class Runner:
    """Succeeds where the episode's number is even; dies as told, over one episode, ``deaths`` times."""

    def __init__(self, folder: Path, fatal: EpisodeKey | None = None, deaths: int = 0, seconds: float = 0.0) -> None:
        self.folder, self.fatal, self.deaths, self.seconds = folder, fatal, deaths, seconds

    def __call__(self, episode: Episode) -> Outcome:
        key = episode.key
        begun = self.folder / f"{key.task_id}-{key.episode_id}-{os.getpid()}"
        begun.touch()
        time.sleep(self.seconds)
        if key == self.fatal and len(list(self.folder.glob(f"{key.task_id}-{key.episode_id}-*"))) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(EpisodeResult(key.episode_id % 2 == 0, 5, 2, np.zeros((6, 3))), 0.1)


def run(runner: Runner, work: list[Episode], workers: int) -> dict[EpisodeKey, bool]:
    found: list[tuple[EpisodeKey, bool]] = []
    run_episodes(runner, work, workers, lambda episode, outcome: found.append((episode.key, outcome.result.success)))
    assert len(found) == len(dict(found))  # each once
    return dict(found)


def test_two_processes_give_what_one_gives(tmp_path):
    work = episodes(3, 3)
    one, two = run(Runner(tmp_path), work, 1), run(Runner(tmp_path), work, 2)
    assert one == two == {episode.key: episode.key.episode_id % 2 == 0 for episode in work}


def test_a_killed_process_s_episode_is_run_again_by_another(tmp_path, capsys):
    work = episodes(2, 3)
    outcomes = run(Runner(tmp_path, fatal=work[1].key, deaths=1), work, 2)
    assert outcomes == {episode.key: episode.key.episode_id % 2 == 0 for episode in work}
    tries = [path.name.split("-")[2] for path in tmp_path.glob("0-1-*")]
    assert len(set(tries)) == 2  # processes
    said = capsys.readouterr().err
    assert said.count("libero_object task 0 episode 1: the simulator's process was killed by SIGKILL") == 1


class Sceneless(EpisodeRunner):
    """Has no mesh for one task."""

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id

    def run(self, episode: Episode) -> Outcome:
        if episode.key.task_id == self.task_id:
            raise SceneError("no yogurt.xml")
        return Outcome(EpisodeResult(True, 5, 2, np.zeros((6, 3))), 0.1)


def test_a_task_whose_scene_does_not_load_is_left_out_and_the_others_are_run():
    work, found, left_out = episodes(3, 4), [], {}
    run_episodes(Sceneless(1), work, 2, lambda episode, _: found.append(episode.key), leave_out=left_out.__setitem__)
    assert sorted(key.task_id for key in found) == [0] * 4 + [2] * 4
    assert left_out == {work[4].task: "no yogurt.xml"}
    with pytest.raises(RunStopped, match="task 1 episode 0: no yogurt.xml"):
        run_episodes(Sceneless(1), work, 1, lambda episode, _: None)


def test_an_episode_that_kills_every_process_ends_the_run_and_is_named(tmp_path):
    work, kept = episodes(1, 4), []
    with pytest.raises(RunStopped, match=r"task 0 episode 2: the simulator's process was killed by SIGKILL"):
        run_episodes(Runner(tmp_path, fatal=work[2].key, deaths=9), work, 1, lambda episode, _: kept.append(episode))
    assert kept == work[:2]
    assert len(list(tmp_path.glob("0-2-*"))) == 3


def test_ctrl_c_ends_the_processes_and_keeps_what_was_finished(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from tests.libero.test_libero_workers import Runner, episodes\n"
        "from examples.libero.workers import run_episodes\n"
        "if __name__ == '__main__':\n"
        "    runner = Runner(pathlib.Path(sys.argv[1]), seconds=0.2)\n"
        "    run_episodes(runner, episodes(2, 50), 2, lambda episode, _: print(episode.key.episode_id, flush=True))\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    said = process.communicate(timeout=20)[1]
    assert process.returncode in (-signal.SIGINT, 1, 130) and said.count("Traceback") == 1, said
    for path in tmp_path.glob("?-*-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.split("-")[2]), 0)


def test_a_process_stays_with_a_task_and_an_idle_one_goes_where_fewest_are():
    work = episodes(3, 2)
    queue = _TaskQueue(work)
    first = queue.take(None, [])
    assert first is work[0]
    second = queue.take(None, [first])
    assert second is work[2]
    assert queue.take(first.task, [second]) is work[1]
    assert queue.take(first.task, [second]) is work[4]  # task 0 is through; nobody is at task 2
    queue.put_back(work[1])
    assert queue.take(first.task, []) is work[1]
    assert Counter(queue.take(None, []).task.task_id for _ in range(len(queue))) == {1: 1, 2: 1}
    assert queue.take(None, []) is None


class Unstartable(Runner):
    """Kills a process that is about to receive it."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        (self.folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_die_when_they_start_end_the_run(tmp_path):
    with pytest.raises(RunStopped, match="a simulator's process was killed by SIGKILL .* when it started"):
        run(Unstartable(tmp_path), episodes(1, 1), 1)
    assert len(list(tmp_path.iterdir())) == 3
