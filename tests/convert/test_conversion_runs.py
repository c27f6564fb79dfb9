"""What a conversion leaves behind, whatever becomes of its episodes and its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_utils.convert.__main__ import main
from data_utils.convert.runner import run
from data_utils.errors import DataError
from data_utils.h5io import Episode
from data_utils.shards import Shard
from tests.convert.sources import Source

REPOSITORY = Path(__file__).parents[2]
# A conversion in a process of its own: argv is the output folder, a folder for the log, and the kinds of episodes.
CONVERSION = """
import sys
from pathlib import Path
from data_utils.convert.runner import run
from tests.convert.sources import Source
if __name__ == "__main__":
    out, log, *kinds = sys.argv[1:]
    print(run(Source(tuple(kinds), Path(log)), Path(out), 2, {}).text())
"""


def start(tmp_path: Path, *kinds: str) -> subprocess.Popen:
    (tmp_path / "conversion.py").write_text(CONVERSION)
    (tmp_path / "log").mkdir(exist_ok=True)
    command = [sys.executable, str(tmp_path / "conversion.py"), str(tmp_path / "out"), str(tmp_path / "log"), *kinds]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def record(out: Path) -> dict:
    return json.loads((out / "conversion.json").read_text())


def test_every_episode_is_converted_skipped_or_failed_and_the_rest_goes_on(tmp_path, capfd):
    kinds = ("good", "skip", "wrong", "killed", "surprise", "good", "skip")
    summary = run(Source(kinds), tmp_path, 2, {"image_size": 24})
    assert (summary.converted, summary.already_there) == (2, 0)
    assert summary.skipped == {"part/01_skip": "not successful", "part/06_skip": "not successful"}
    failures = {failure.episode: failure for failure in summary.failed}
    assert {name: failure.rule for name, failure in failures.items()} == {
        "part/02_wrong": "pose",
        "part/03_killed": "worker died",
        "part/04_surprise": "unexpected error",
    }
    assert "SIGKILL" in failures["part/03_killed"].message
    assert "KeyError at sources.py" in failures["part/04_surprise"].message
    assert "part/02_wrong: part/02_wrong: has no pose" in capfd.readouterr().err

    written = record(tmp_path)
    assert written["state"] == "finished" and written["settings"] == {"image_size": 24}
    assert (written["episodes"], written["converted"], len(written["skipped"]), len(written["failed"])) == (7, 2, 2, 3)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".conversion.lock", "00_good.h5", "05_good.h5", "conversion.json", "sources.jsonl"]
    with Episode(tmp_path / "part/00_good.h5") as episode:
        assert episode.prompts == ["wave"]


def test_a_finished_episode_is_not_converted_again_and_leftovers_are_removed(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    log.mkdir()
    run(Source(("good",)), out, 1, {})
    leftover = out / "part/.01_good.h5.12345.tmp"
    leftover.write_bytes(b"half an episode")
    summary = run(Source(("good", "good"), log), out, 1, {})
    assert (summary.converted, summary.already_there) == (1, 1)
    assert [path.name for path in log.iterdir()] == ["01_good"]
    assert not leftover.exists()


def test_the_first_failure_of_each_kind_is_in_the_summary_on_screen(tmp_path):
    summary = run(Source(("wrong", "wrong", "surprise", "wrong")), tmp_path, 1, {})
    lines = summary.text().splitlines()
    assert lines[1:] == [
        "  failed 3: pose; the first, part/00_wrong: part/00_wrong: has no pose",
        f"  failed 1: unexpected error; the first, part/02_surprise: {summary.failed[2].message}",
    ]


def test_other_settings_on_a_folder_with_episodes_are_refused_by_the_innermost_value(tmp_path):
    long = "a/very/long/path/" * 12

    def settings(order: str, value: float, src: str) -> dict:
        return {"src": src, "mapping": {"arms": [{"pose": {"order": order, "values": [0.0, value]}}]}, "seed": 1}

    run(Source(("good",)), tmp_path, 1, settings("xyzw", 1.0, f"{long}a"))
    with pytest.raises(DataError, match=r"name another --out, or remove that folder") as refusal:
        run(Source(("good",)), tmp_path, 1, settings("wxyz", 2.0, f"{long}b"))
    said = str(refusal.value)
    assert "mapping.arms[0].pose.order: xyzw -> wxyz; mapping.arms[0].pose.values[1]: 1.0 -> 2.0; src: ..." in said
    assert "path/a -> ..." in said and "path/b)" in said and "seed" not in said


def test_a_folder_in_which_nothing_was_converted_is_begun_anew_with_other_settings(tmp_path):
    run(Source(("wrong", "skip")), tmp_path, 1, {"order": "xyzw"})
    summary = run(Source(("good", "good")), tmp_path, 1, {"order": "wxyz"})
    assert summary.converted == 2 and record(tmp_path)["settings"] == {"order": "wxyz"}


def test_episodes_of_a_killed_conversion_count_though_they_are_not_recorded(tmp_path):
    run(Source(("good",)), tmp_path, 1, {"order": "xyzw"})
    content = record(tmp_path) | {"state": "running", "converted": 0}
    (tmp_path / "conversion.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="order: xyzw -> wxyz"):
        run(Source(("good",)), tmp_path, 1, {"order": "wxyz"})


def test_a_killed_conversion_leaves_whole_episodes_and_is_taken_up_again(tmp_path):
    process = start(tmp_path, "good", "slow", "slow", "good")
    wait_for(tmp_path / "log/02_slow")
    process.kill()
    process.communicate()
    out = tmp_path / "out"
    assert [path.name for path in out.rglob("*.h5")] == ["00_good.h5"]
    with Episode(out / "part/00_good.h5") as episode:
        assert len(episode) == 3
    assert record(out)["state"] == "running"
    # Names tell what was done; the slow ones are now quick.
    for old in ("01_slow", "02_slow"):
        (tmp_path / "log" / old).unlink()
    summary = run(Source(("good", "good", "good", "good")), out, 2, {})
    assert (summary.converted, summary.already_there) == (3, 1)


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, "good", "slow", "slow")
    wait_for(tmp_path / "log/02_slow")
    os.kill(process.pid, signal.SIGINT)
    said, complaints = process.communicate(timeout=20)
    assert "interrupted; the same command goes on from here" in said
    assert "Traceback" not in complaints
    assert record(tmp_path / "out")["state"] == "interrupted"
    assert [path.name for path in (tmp_path / "out").rglob("*.h5")] == ["00_good.h5"]


def test_two_conversions_do_not_share_a_folder(tmp_path):
    process = start(tmp_path, "slow")
    wait_for(tmp_path / "log/00_slow")
    with pytest.raises(DataError, match="another conversion is writing there"):
        run(Source(("good",)), tmp_path / "out", 1, {})
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["hdf7"], "unknown format 'hdf7'; known: libero, lerobot, robomimic"),
        (["lerobot", "--out", "x"], "--src"),
        (["lerobot", "--src", "/nowhere", "--out", "x", "--mapping", "droid"], "/nowhere"),
        (["lerobot", "--src", ".", "--out", "x", "--mapping", "droid", "--wrokers", "2"], "--wrokers"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and complaint in said


# Part argv[3] of a conversion; the others as in CONVERSION.
PART = CONVERSION.replace("out, log, *kinds", "out, log, part, *kinds").replace(
    "Path(out), 2, {})", "Path(out), 1, {}, shard=Shard.parse(part))"
).replace("import sys\n", "import sys\nfrom data_utils.shards import Shard\n", 1)  # fmt: skip


def start_part(tmp_path: Path, part: str, *kinds: str) -> subprocess.Popen:
    (tmp_path / "part.py").write_text(PART)
    (tmp_path / "log").mkdir(exist_ok=True)
    command = [sys.executable, str(tmp_path / "part.py"), str(tmp_path / "out"), str(tmp_path / "log"), part, *kinds]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_parts_side_by_side_one_of_them_killed_and_run_again_come_to_what_one_conversion_does(tmp_path):
    kinds = ("good", "slow", "skip", "good", "good", "wrong", "good")
    quick = tuple("good" if kind == "slow" else kind for kind in kinds)
    parts = [start_part(tmp_path, f"{index}/3", *kinds) for index in range(3)]
    wait_for(tmp_path / "log/01_slow")  # part 1's first
    parts[1].kill()
    for part in (parts[0], parts[2]):
        assert part.wait(60) == 0, part.stderr.read()
    again = start_part(tmp_path, "1/3", *quick)
    assert again.wait(60) == 0, again.stderr.read()
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("conversion*.json")) == [
        f"conversion.{index}_of_3.json" for index in range(3)
    ]
    merged = run(Source(quick), out, 1, {})
    assert (merged.converted, merged.already_there) == (0, 5)
    assert set(merged.skipped) == {"part/02_skip"} and [one.episode for one in merged.failed] == ["part/05_wrong"]

    whole = tmp_path / "whole"
    run(Source(quick), whole, 1, {})
    for folder in (out, whole):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        episodes = [f"part/{number:02d}_good.h5" for number in (0, 1, 3, 4, 6)]
        assert names == sorted([".conversion.lock", "conversion.json", "sources.jsonl", *episodes])
    lines = [sorted((folder / "sources.jsonl").read_text().splitlines()) for folder in (out, whole)]
    assert lines[0] == lines[1]


def test_the_whole_waits_for_its_parts_and_a_part_is_not_converted_twice_at_once(tmp_path):
    part = start_part(tmp_path, "0/2", "slow", "good")
    try:
        wait_for(tmp_path / "log/00_slow")
        for shard in (None, Shard(0, 2)):
            with pytest.raises(DataError, match="another conversion is writing there"):
                run(Source(("slow", "good")), tmp_path / "out", 1, {}, shard=shard)
        assert run(Source(("slow", "good")), tmp_path / "out", 1, {}, shard=Shard(1, 2)).converted == 1
    finally:
        part.kill()
        part.communicate()


def test_parts_of_other_settings_do_not_mix(tmp_path):
    run(Source(("good", "good")), tmp_path, 1, {"order": "xyzw"}, shard=Shard(0, 2))
    with pytest.raises(DataError, match="order: xyzw -> wxyz"):
        run(Source(("good", "good")), tmp_path, 1, {"order": "wxyz"}, shard=Shard(1, 2))


def test_a_part_that_there_is_not_is_one_line(tmp_path, capsys):
    assert main(["lerobot", "--src", str(tmp_path), "--out", str(tmp_path / "out"), "--shard", "4/4"]) == 2
    assert "--shard is 4/4; the parts are 0/4 to 3/4" in capsys.readouterr().err


def test_an_array_task_of_slurm_runs_its_part():
    script = ["bash", "scripts/slurm/parts.sbatch", "data_utils.convert", "lerobot", "--out", "episodes"]
    task = {**os.environ, "PYTHON": "echo", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    for more, part in (({"PARTS": "16"}, "3/16"), ({"SLURM_ARRAY_TASK_COUNT": "4"}, "3/4")):
        said = subprocess.run(
            script, cwd=REPOSITORY, env=task | more, capture_output=True, text=True, check=True
        ).stdout
        assert said == f"-m data_utils.convert lerobot --out episodes --shard {part}\n"
