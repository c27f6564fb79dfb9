"""The index of episode files: what it finds, what it checks again, and that damage never ends the process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.checks import checker
from data_utils.checks.checker import FileChecker, Request, check_files
from data_utils.data_loc import Location
from data_utils.errors import DataError
from data_utils.index import __main__ as index_command
from data_utils.index import episode_index as index
from data_utils.index.episode_index import EpisodeIndex
from data_utils.index.episode_list import list_episodes
from data_utils.shards import Shard
from tests.data.episodes import write_episode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_episode(tmp_path_factory.mktemp("template") / "episode.h5", frames=3)


@pytest.fixture
def folder(tmp_path, template, monkeypatch):
    """Four episodes in two folders, all changed a while ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    for name in ("a/0.h5", "a/1.h5", "b/2.h5", "3.h5"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(template, root / name)
    return settle(root)


def settle(root):
    """Make the folders look as if nothing had happened for a minute."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, (time.time() - 60, time.time() - 60))
    return root


def opened(path, **options):
    """The index of ``path``, and the files that it checked, one by one."""
    checked = []

    class Recording(FileChecker):
        def check(self, requests, done=None):
            checked.extend(Path(request.path).name for request in requests)
            return check_files(requests, done)

    return EpisodeIndex(path, Recording(), **options), sorted(checked)


def names(of):
    return sorted(Path(os.fsdecode(path)).name for path in of.episodes["path"].to_pylist())


def test_a_second_opening_checks_nothing(folder):
    first, checked = opened(folder)
    assert names(first) == checked == ["0.h5", "1.h5", "2.h5", "3.h5"]
    settle(folder)
    opened(folder)  # the first index was made right after the folder ".apt_index"
    before = (folder / ".apt_index" / "episodes.parquet").stat().st_mtime_ns
    second, checked = opened(folder)
    assert checked == [] and second.episodes.equals(first.episodes)
    assert (folder / ".apt_index" / "episodes.parquet").stat().st_mtime_ns == before


def test_new_changed_and_removed_files_are_noticed_and_nothing_else_is_checked(folder, template):
    opened(folder)
    settle(folder)
    shutil.copy(template, folder / "a" / "4.h5")
    (folder / "c").mkdir()
    shutil.copy(template, folder / "c" / "5.h5")
    write_episode(folder / "b" / "2.h5", frames=5)  # replaced
    (folder / "3.h5").unlink()
    again, checked = opened(folder)
    assert checked == ["2.h5", "4.h5", "5.h5"] and names(again) == ["0.h5", "1.h5", "2.h5", "4.h5", "5.h5"]
    assert sorted(again.episodes["length"].to_pylist()) == [3, 3, 3, 3, 5]
    shutil.rmtree(folder / "a")
    assert names(opened(folder)[0]) == ["2.h5", "5.h5"]


def test_a_file_overwritten_in_place_needs_a_full_refresh(folder):
    opened(folder)
    settle(folder)
    opened(folder)
    (folder / "a" / "0.h5").write_bytes(b"damage")
    quick, checked = opened(folder)
    assert checked == [] and not any(quick.episodes["rule"].to_pylist())
    full, checked = opened(folder, full=True)
    assert checked == ["0.h5"] and [rule for rule in full.episodes["rule"].to_pylist() if rule] == ["file"]


def test_a_copy_of_the_data_does_not_trust_the_times_of_its_folders(folder, tmp_path):
    opened(folder)
    settle(folder)
    opened(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "a" / "0.h5").write_bytes(b"damage")
    settle(copy)
    again, checked = opened(copy)
    assert checked == ["0.h5"] and sorted(again.episodes["rule"].to_pylist()) == ["", "", "", "file"]


def test_an_index_that_is_damaged_or_foreign_is_built_again_with_a_warning(folder, caplog):
    opened(folder)
    file = folder / ".apt_index" / "episodes.parquet"
    for content in (b"", b"PAR1 nonsense PAR1", file.read_bytes()[:-200]):
        file.write_bytes(content)
        caplog.clear()
        again, checked = opened(folder)
        assert len(checked) == len(again) == 4 and "built again" in caplog.text
        assert EpisodeIndex(folder).episodes.equals(again.episodes)


def test_an_index_beside_data_that_cannot_be_written_lies_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_try_make", lambda folder: False)  # root may write anywhere
    opened(folder)
    settle(folder)
    _, checked = opened(folder)
    assert checked == [] and not (folder / ".apt_index").exists()
    assert len(list((tmp_path / "cache" / "apt" / "index").glob("*.parquet"))) == 1


def test_a_glob_has_an_index_of_its_own(folder):
    pattern = folder / "*" / "*.h5"
    first, checked = opened(pattern)
    assert names(first) == checked == ["0.h5", "1.h5", "2.h5"]
    settle(folder)
    assert opened(pattern)[1] == [] and opened(pattern)[1] == []
    assert names(opened(folder / "3.h5")[0]) == ["3.h5"]
    with pytest.raises(DataError, match="matches no episode files"):
        EpisodeIndex(folder / "*" / "*" / "*.h5")


def test_a_folder_that_links_to_itself_ends(folder):
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(folder / "b")
    assert names(opened(folder)[0]) == ["0.h5", "1.h5", "2.h5", "2.h5", "3.h5"]


def test_names_need_not_be_text(folder, template):
    odd = os.fsencode(folder / "a") + b"/\xff\xfe.h5"
    shutil.copy(template, os.fsdecode(odd))
    assert odd in EpisodeIndex(folder).episodes["path"].to_pylist()


def test_two_builders_at_once_leave_a_whole_index(folder):
    command = [sys.executable, "-m", "data_utils.index", str(folder), "--workers", "1"]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        out, _ = run.communicate(timeout=60)
        assert run.returncode == 0 and "4 episodes, 12 frames" in out
    settle(folder)
    assert opened(folder)[1] == [] and not list((folder / ".apt_index").glob("*.tmp"))


def test_parts_are_checked_apart_and_taken_up_by_whoever_opens_the_whole(folder, template):
    for number in range(4, 12):
        shutil.copy(template, folder / "b" / f"{number}.h5")
    parts = [opened(folder, shard=Shard(part, 3)) for part in range(2)]
    assert all(0 < len(found) == len(checked) < 12 for found, checked in parts)
    assert len(list((folder / ".apt_index").iterdir())) == 2  # there is none of the whole yet
    assert opened(folder, shard=Shard(1, 3))[1] == []  # run again
    whole, checked = opened(folder)
    assert sorted([*checked, *parts[0][1], *parts[1][1]]) == sorted(f"{number}.h5" for number in range(12))
    assert len(whole) == 12 and [file.name for file in (folder / ".apt_index").iterdir()] == ["episodes.parquet"]
    settle(folder)
    opened(folder)
    late = opened(folder, shard=Shard(2, 3))  # of an index that is there: nothing to do, nothing twice
    again, checked = opened(folder)
    assert late[1] == checked == [] and again.episodes.equals(whole.episodes)


def test_a_part_wants_a_folder_that_all_can_write(folder, monkeypatch, capsys):
    monkeypatch.setattr(index, "_try_make", lambda folder: False)
    assert index_command.main([str(folder), "--shard", "0/2"]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert index_command.main([str(folder), "--shard", "2/2"]) == 2
    assert "the parts are 0/2 to 1/2" in capsys.readouterr().err


def test_the_command_counts_faults_by_rule(folder, capsys):
    (folder / "a" / "0.h5").write_bytes(b"damage")
    with h5py.File(folder / "a" / "1.h5", "r+") as file:
        file["gripper"][...] = 3.0
    assert index_command.main([str(folder)]) == 0
    assert "2 cannot be used; " in (out := capsys.readouterr().out) and "file: 1" in out and "checksum: 1" in out
    assert index_command.main([str(folder / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_one_index_serves_datasets_with_different_cameras(folder):
    shutil.copy(write_episode(folder / "b" / "one.h5", frames=3, cameras=("front",)), folder / "b" / "other.h5")
    with h5py.File(folder / "a" / "0.h5", "r+") as file:
        file["wrist/K"][...] = -1.0
    settle(folder)

    def left_out(*cameras):
        episodes = list_episodes([Location(str(folder))], cameras)
        return [(Path(fault.path).name, fault.rule) for fault in episodes.faults]

    assert left_out("front") == []
    assert left_out("front", "wrist") == [("0.h5", "checksum"), ("one.h5", "camera"), ("other.h5", "camera")]
    assert len(left_out("top")) == 6


def test_overlapping_locations_give_every_episode_once(folder):
    episodes = list_episodes([Location(str(folder)), Location(str(folder / "a"))], ("front",))
    assert [Path(path).name for path in episodes] == ["3.h5", "0.h5", "1.h5", "2.h5"]


# -- the checking processes -----------------------------------------------------------------------------------------


@pytest.fixture
def rigged(monkeypatch, tmp_path):
    """Checking processes in which a file called crash.h5 ends the process and hang.h5 never returns."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, h5py, time\n"
        "original = h5py.File.__init__\n"
        "def init(self, name, *args, **options):\n"
        "    if str(name).endswith('crash.h5'):\n"
        "        ctypes.string_at(0)\n"
        "    if str(name).endswith('hang.h5'):\n"
        "        time.sleep(600)\n"
        "    original(self, name, *args, **options)\n"
        "h5py.File.__init__ = init\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_file_that_crashes_or_hangs_the_reader_is_a_fault_and_the_rest_is_checked(rigged, tmp_path, template):
    files = [shutil.copy(template, tmp_path / name) for name in ("0.h5", "crash.h5", "1.h5", "hang.h5", "2.h5")]
    with FileChecker(workers=1, timeout=1.0) as checker_:
        reports = checker_.check([Request(str(path)) for path in files])
    assert [report.rule for report in reports] == ["", "file", "", "file", ""]
    assert "crash.h5" in reports[1].message and "SIGSEGV" in reports[1].message
    assert "hang.h5" in reports[3].message and "more than 1 s" in reports[3].message
    assert [report.length for report in reports] == [3, 0, 3, 0, 3]


def test_a_checking_process_that_somebody_kills_is_started_again(template):
    with FileChecker(workers=1) as checker_:
        checker_.check([Request(str(template))])
        process = checker_._children[0]._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert checker_.check([Request(str(template))])[0].length == 3


def test_random_damage_to_the_bytes_of_a_file_never_reaches_this_process(tmp_path, template):
    whole = np.frombuffer(template.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    requests = []
    for number in range(60):
        data = whole.copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (tmp_path / f"{number}.h5").write_bytes(data)
        requests.append(Request(str(tmp_path / f"{number}.h5"), depth="frames"))
    with FileChecker(timeout=20.0) as checker_:
        reports = checker_.check(requests)
    assert sum(bool(report.rule or report.camera_faults) for report in reports) > 15
    assert all("\n" not in report.message for report in reports)


def test_checking_frames_finds_the_camera_that_is_damaged(tmp_path, template):
    path = shutil.copy(template, tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["wrist/rgb"][1] = file["wrist/rgb"][1][:-10]
    header, frames = check_files([Request(str(path)), Request(str(path), depth="frames")])
    assert not header.camera_faults and set(frames.camera_faults) == {"wrist"} and frames.length == 3
    assert "frame 1" in frames.camera_faults["wrist"][1]


def test_checking_processes_need_no_torch_and_end_with_their_parent(template):
    modules = "data_utils.index.__main__, data_utils.checks.examine, data_utils.h5io"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    child = subprocess.Popen(
        [sys.executable, "-m", "data_utils.checks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert json.loads(child.stdout.readline()) == {"ready": True}
    child.stdin.close()
    assert child.wait(timeout=10) == 0
    with pytest.raises(ValueError, match="depth"):
        Request("a.h5", depth="all")


def test_a_checker_that_cannot_start_says_so(monkeypatch, template):
    monkeypatch.setattr(checker.sys, "executable", "/bin/false")
    with FileChecker(workers=1) as checker_, pytest.raises(RuntimeError, match="did not start"):
        checker_.check([Request(str(template))])
