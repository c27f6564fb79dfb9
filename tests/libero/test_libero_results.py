"""Results survive kills, interruptions and torn lines, and never mix two runs' settings."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_utils.shards import Shard
from examples.libero.results import ResultsError, Row, SuiteResults, read_results, result_files

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"seed": 0, "max_steps": 500, "policy": {"name": "model", "checkpoint_sha256": "ab" * 32}}
ROWS = [
    Row(task, episode, (task + episode) % 3 == 0, f"put bowl {task}, please")
    for task in (0, 1, 10)
    for episode in (0, 2, 11)
]


def opened(folder: Path, conti: bool = True, shard: Shard | None = None, **changed) -> SuiteResults:
    return SuiteResults(folder, "apt", SETTINGS | changed, {"versions": {"mujoco": "3.3.2"}}, conti, shard)


def write(folder: Path, rows) -> None:
    with opened(folder) as results:
        for row in rows:
            results.add(row, steps=7 + row.episode_id)


def test_rows_and_the_mean_are_written_in_the_order_of_tasks_and_episodes(tmp_path):
    write(tmp_path, [ROWS[3], ROWS[0], ROWS[8]])
    assert (tmp_path / "apt.csv").read_text() == (
        "task_id,episode_id,success,prompt\n"
        '0,0,1,"put bowl 0, please"\n'
        '1,0,0,"put bowl 1, please"\n'
        '10,11,1,"put bowl 10, please"\n'
        "mean,3,0.666667,\n"
    )
    record = json.loads((tmp_path / "apt.json").read_text())
    assert record["settings"] == SETTINGS and record["versions"] == {"mujoco": "3.3.2"}
    assert record["episodes"][-1] == {"task_id": 10, "episode_id": 11, "steps": 18}
    assert (record["episodes_done"], record["successes"]) == (3, 2)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(ROWS), stops=st.sets(st.integers(1, 8)), torn=st.integers(0, 10**6))
def test_a_run_interrupted_anywhere_gives_the_same_file_as_one_that_was_not(tmp_path_factory, order, stops, torn):
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    write(whole, ROWS)
    for begin, end in itertools.pairwise([0, *sorted(stops), len(ROWS)]):
        write(parts, order[begin:end])
        file = parts / "apt.csv"
        text = file.read_text()
        last_line = text.rindex("\n", 0, -1) + 1
        file.write_text(text[: last_line + torn % (len(text) - last_line)])  # the last line cut short, or gone
        with opened(parts) as results:
            assert len(results.rows) == end
    write(parts, ROWS[:1])  # a repaired file is written whole
    assert (parts / "apt.csv").read_bytes() == (whole / "apt.csv").read_bytes()


def test_parts_come_to_the_files_of_a_whole_run_and_are_taken_up_once(tmp_path):
    write(tmp_path / "whole", ROWS)
    folder = tmp_path / "parts"
    write(folder, ROWS[:2])  # before there were parts
    with opened(folder, shard=Shard(0, 3)) as first, opened(folder, shard=Shard(2, 3)) as last:  # side by side
        assert ROWS[1].key in last  # not run a second time
        for results, rows in ((first, ROWS[3::3]), (last, ROWS[2::3])):
            for row in rows:
                results.add(row, steps=7 + row.episode_id)
        with pytest.raises(ResultsError, match="another run is writing there"):
            opened(folder)
    assert list(result_files([folder])) == [folder / "apt.csv"] and len(list(folder.glob("apt.*_of_3.csv"))) == 2
    write(folder, ROWS[4::3])  # the whole, which runs what the part that never came left
    assert {path.name for path in folder.iterdir()} == {"apt.csv", "apt.json", ".apt.lock"}
    assert (folder / "apt.csv").read_bytes() == (tmp_path / "whole/apt.csv").read_bytes()
    found, wanted = (json.loads((of / "apt.json").read_text()) for of in (folder, tmp_path / "whole"))
    assert found["episodes"] == wanted["episodes"] and found["episodes_done"] == len(ROWS)


def test_a_part_of_other_settings_is_not_taken_up(tmp_path):
    with opened(tmp_path, shard=Shard(1, 2), seed=1) as results:
        results.add(ROWS[0])
    with pytest.raises(ResultsError, match=r"apt\.1_of_2\.csv: was begun with other settings"):
        opened(tmp_path)
    with opened(tmp_path, conti=False):
        assert not list(tmp_path.glob("apt.1_of_2.csv")) and list(tmp_path.glob("apt.1_of_2.before-1.csv"))


def test_a_half_written_row_is_run_again(tmp_path):
    write(tmp_path, ROWS[:3])
    file = tmp_path / "apt.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + "0,11,0,put bo")
    with opened(tmp_path) as results:
        assert [row.episode_id for row in results.rows.values()] == [0, 2]
        results.add(ROWS[2])
    assert len(read_results(file)[0]) == 3


def test_an_episode_that_only_the_json_knows_is_run_again(tmp_path):
    write(tmp_path, ROWS[:2])
    before = (tmp_path / "apt.csv").read_text()
    write(tmp_path, ROWS[2:3])
    (tmp_path / "apt.csv").write_text(before)  # as if killed between the two files
    with opened(tmp_path) as results:
        assert (0, 11) not in results and (0, 2) in results
        results.write()
    assert len(json.loads((tmp_path / "apt.json").read_text())["episodes"]) == 2


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_steps": 220}, "max_steps: 500 -> 220"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"policy": {"name": "model", "checkpoint_sha256": "cd" * 32}}, "policy.checkpoint_sha256: abab"),
    ],
)
def test_results_of_other_settings_are_not_gone_on_with(tmp_path, changed, says):
    write(tmp_path, ROWS[:3])
    with pytest.raises(ResultsError, match=f"begun with other settings .*{says}.*--no-conti") as caught:
        opened(tmp_path, **changed)
    assert "\n" not in str(caught.value)
    write(tmp_path, ROWS[3:4])  # the refusal left neither the lock nor a change behind
    assert len(read_results(tmp_path / "apt.csv")[0]) == 4


def test_beginning_anew_moves_what_is_there_aside(tmp_path):
    write(tmp_path, ROWS[:3])
    for seed in (1, 2):
        with opened(tmp_path, conti=False, seed=seed) as results:
            assert not results.rows
            results.add(ROWS[seed])
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["apt.before-1.csv", "apt.before-2.csv", "apt.csv"]
    assert len(read_results(tmp_path / "apt.before-1.csv")[0]) == 3
    assert list(result_files([tmp_path])) == [tmp_path / "apt.csv"]


def test_two_runs_never_write_the_same_file(tmp_path):
    with opened(tmp_path), pytest.raises(ResultsError, match=r"apt\.csv: another run is writing there"):
        opened(tmp_path)
    with opened(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "the first line is not task_id"),
        ("task_id,episode_id,success,prompt\n0,0,yes,go\n0,1,1,go\n", "line 2 is not task_id"),
        ("task_id,episode_id,success,prompt\n0,0,1,go\n0,0,1,go\n", "task 0 episode 0 a second time"),
    ],
)
def test_files_that_are_no_results_are_left_alone(tmp_path, text, says):
    write(tmp_path, ROWS[:1])
    (tmp_path / "apt.csv").write_text(text)
    with pytest.raises(ResultsError, match=says):
        opened(tmp_path)
    assert (tmp_path / "apt.csv").read_text() == text


def test_results_without_a_record_of_their_settings_are_not_gone_on_with(tmp_path):
    write(tmp_path, ROWS[:1])
    (tmp_path / "apt.json").unlink()
    with pytest.raises(ResultsError, match=r"apt\.json: does not tell the settings of apt\.csv"):
        opened(tmp_path)


def test_a_model_s_name_is_a_file_s():
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ResultsError, match="cannot name a file"):
            SuiteResults(Path("nowhere"), name, {}, {})
    assert not Path("nowhere").exists()


def test_a_kill_at_any_moment_loses_nothing_that_was_reported(tmp_path):
    program = (
        "import sys, pathlib; from examples.libero.results import Row, SuiteResults\n"
        "with SuiteResults(pathlib.Path(sys.argv[1]), 'apt', {}, {}) as results:\n"
        "    for number in range(len(results.rows), 10**6):\n"
        "        results.add(Row(0, number, True, 'go'))\n"
        "        print(number, flush=True)\n"
    )
    reported = -1
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        while (line := process.stdout.readline()) and int(line) < reported + 20:
            pass
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].splitlines()
        reported = int([line, *rest][-1])
        done = read_results(tmp_path / "apt.csv")[0]
        assert sorted(key[1] for key in done) == list(range(len(done))) and reported + 1 <= len(done) <= reported + 2
