"""Steps as processes: side by side, in order, with failures that stay among themselves, stopped and gone on with."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from apt.ablation.runner import Pace, Runner
from apt.ablation.study import Step


class Bench:
    """Steps that are shell lines, each done when the file of its name is there."""

    def __init__(self, folder: Path, jobs: int = 1) -> None:
        self.folder, self.said, self.failed = folder, [], {}
        self.runner = Runner(["cpu"] * jobs, {"OWN": "yes"}, Pace(folder / "pace.json"), self.said.append, self.note)

    def note(self, step: Step, words: str) -> None:
        self.failed[step.title] = words

    def step(self, name: str, line: str = "true", after: Step | None = None) -> Step:
        done = self.folder / name
        script = f"cd '{self.folder}'; {line}; echo $OWN > {name}"
        return Step(
            name, "work", 1, lambda gpus: ["sh", "-c", script], self.folder / "logs" / f"{name}.txt",
            done.is_file, lambda: 0 if done.is_file() else 1, after=after,
        )  # fmt: skip

    def run(self, steps: list[Step]) -> None:
        with self.runner.catching():
            self.runner.run(steps)


def test_steps_run_in_order_with_the_environment_and_are_not_run_again(tmp_path):
    bench = Bench(tmp_path)
    first = bench.step("first", "echo first >> order")
    second = bench.step("second", "echo second >> order", after=first)
    bench.run([second, first])
    assert (tmp_path / "order").read_text().split() == ["first", "second"]
    assert (tmp_path / "second").read_text().strip() == "yes"
    assert [line.split(":")[0] for line in bench.said] == [
        "first begins",
        "1/2 first",
        "second begins",
        "2/2 second",
    ]
    again = Bench(tmp_path)
    again.run([second, first])
    assert not again.said and (tmp_path / "order").read_text().split() == ["first", "second"]


def test_jobs_run_side_by_side(tmp_path):
    bench = Bench(tmp_path, jobs=2)
    # Each waits for the other: one after the other, they would wait for ever.
    steps = [bench.step(a, f"touch {a}_here; timeout 20 sh -c 'until [ -e {b}_here ]; do sleep 0.02; done'")
             for a, b in (("a", "b"), ("b", "a"))]  # fmt: skip
    bench.run(steps)
    assert all(step.finished() for step in steps) and not bench.failed


def test_a_failed_step_is_named_with_its_last_line_and_the_others_go_on(tmp_path):
    bench = Bench(tmp_path)
    bad = bench.step("bad", "echo all is well; echo 'error: no disk' >&2; exit 3")
    behind = bench.step("behind", after=bad)
    good = bench.step("good")
    bench.run([bad, behind, good])
    assert bench.failed == {"bad": "error: no disk"}
    assert "FAILED: bad (exit code 3): error: no disk" in bench.said[1]
    assert good.finished() and not behind.finished() and bench.runner.failures == [bad, behind]


def test_a_step_that_ends_well_without_its_files_has_failed(tmp_path):
    bench = Bench(tmp_path)
    bench.run([bench.step("lazy", "exit 0")])
    assert list(bench.failed) == ["lazy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_running_steps_save_and_the_next_run_goes_on(tmp_path, number):
    saves = "trap 'echo saved >> progress; exit 0' TERM; touch running; for i in $(seq 400); do sleep 0.05; done"
    bench = Bench(tmp_path)
    bench_steps = [bench.step("long", f"[ -e progress ] || {{ {saves}; }}"), bench.step("next")]

    def tell() -> None:
        while not (tmp_path / "running").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    bench.run(bench_steps)
    thread.join()
    assert bench.runner.signal == number and not bench.failed
    assert (tmp_path / "progress").read_text() == "saved\n"
    assert not any(step.finished() for step in bench_steps)
    again = Bench(tmp_path)
    again.run(bench_steps)
    assert again.runner.signal is None and all(step.finished() for step in bench_steps)


def test_time_left_follows_from_what_ran_and_is_unknown_before(tmp_path):
    bench = Bench(tmp_path)
    done, waiting = bench.step("done"), bench.step("waiting")
    pace = Pace(tmp_path / "pace.json")
    assert pace.seconds([waiting], 1) is None
    assert Pace(tmp_path / "pace.json", {"work": 7.0}).seconds([waiting], 1) == 7.0
    pace.add("work", 2, 8.0)
    assert pace.seconds([waiting], 1) == 4.0
    assert pace.seconds([waiting, bench.step("other")], 2) == 4.0
    (tmp_path / "done").touch()
    assert pace.seconds([done], 1) == 0.0
