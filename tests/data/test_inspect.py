"""The command that looks at episodes: every fault named, nothing stops it, pictures that show the path."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import cv2
import h5py
import numpy as np
import pytest

from data_utils.drawing.paths import RECORDED
from data_utils.h5io import Episode, write_episode
from data_utils.inspect import __main__ as inspect
from tests.data import episodes
from tests.data.episodes import camera_pose, edited
from tests.data.test_video_episodes import episode_data, write_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Six frames; the front camera looks down at the robot from 2 m."""
    path = episodes.write_episode(tmp_path_factory.mktemp("template") / "episode.h5", frames=6)
    with edited(path) as file:
        pose = np.diag([1.0, -1.0, -1.0, 1.0])
        pose[:3, 3] = (0.1, 0.0, 2.0)
        file["front/pose"][...] = pose
    return path


@pytest.fixture
def folder(tmp_path, template, monkeypatch):
    """Three good episodes; the command runs in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for number in range(3):
        shutil.copy(template, tmp_path / "set" / f"{number}.h5")
    return tmp_path / "set"


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def replace(file, key, value):
    del file[key]
    file[key] = value


def drop_jpeg_end(file):
    file["wrist/rgb"][4] = file["wrist/rgb"][4][:-20]


def go_back(file):
    file["timestamp"][3] = 0.0


EDITS = {
    "pose": lambda file: file["ee_pose"].__setitem__((2, 0, 0, 3), np.nan),
    "rotation": lambda file: file["ee_pose"].__setitem__((2, 0), 2 * np.eye(4)),
    "time": go_back,
    "image": drop_jpeg_end,
    "gripper": lambda file: file["gripper"].__setitem__(5, 1.7),
    "mask": lambda file: file.__setitem__("front/mask", np.ones((6, 20, 32), bool)),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_each_fault_is_one_line_with_file_rule_and_place(folder, capsys, template, legacy):
    for rule, edit in EDITS.items():
        path = folder / f"bad_{rule}.h5"
        shutil.copy(template, path)
        with edited(path) as file:
            if legacy:
                for name in ("schema_version", "checksums", "attributes_crc32"):
                    del file.attrs[name]
            edit(file)
    cut = folder / "bad_file.h5"
    cut.write_bytes(template.read_bytes()[:5000])
    assert inspect.main([str(folder), "--frames", "0"]) == 1
    said = lines(capsys)
    found = [line for line in said if "bad_" in line]
    assert [line.split(": ")[:2] for line in found] == [
        [str(folder / f"bad_{rule}.h5"), rule] for rule in sorted([*EDITS, "file"])
    ]
    assert said[-1].startswith("7 of 10 episodes have faults (") and "1 image" in said[-1]


def test_checksums_and_missing_cameras_are_named(folder, capsys):
    with h5py.File(folder / "1.h5", "r+") as file:
        file["gripper"][2] = 0.9
    assert inspect.main([str(folder / "*.h5"), "--frames", "0", "--dataset-class", "PickPlaceCan"]) == 1
    said = lines(capsys)
    assert f"{folder}/0.h5: camera: e2h_cam camera is missing; the file has front, wrist" in said
    assert any(line.startswith(f"{folder}/1.h5: checksum: gripper is not what was written") for line in said)
    assert said[-1] == "3 of 3 episodes have faults (3 camera, 1 checksum)"


def test_a_video_shorter_than_its_timestamps_is_named(tmp_path, capsys):
    for camera, frames in (("front", 12), ("wrist", 11)):
        write_video(tmp_path / f"{camera}.mp4", frames)
    write_episode(tmp_path / "a.h5", episode_data())
    assert inspect.main([str(tmp_path / "a.h5"), "--quick"]) == 1
    said = lines(capsys)
    assert f"{tmp_path}/a.h5: video: wrist/rgb at frame 11 is 1.100 s of {tmp_path}/wrist.mp4, which spans" in said[-3]
    assert said[-2:] == ["not drawn: it has faults", "the episode has faults (1 video)"]
    assert any("32 x 24; video" in line for line in said)


def test_a_good_set_is_described_and_its_first_episode_drawn(folder, tmp_path, capsys):
    with edited(folder / "2.h5") as file:
        file.attrs["prompt_text"] = "drop the cube"
    assert inspect.main([str(folder), "--json", str(tmp_path / "found.json")]) == 0
    said = "\n".join(lines(capsys))
    for part in ("3 episodes", "18 frames", "all of 6 frames", "2 “pick up the cube”", "1 “drop the cube”"):
        assert part in said
    assert said.endswith("3 of 3 episodes without faults")
    assert sorted(path.name for path in Path("inspect_out/0").iterdir()) == ["frames.png", "view_3d.png"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faulty"] == 0 and [item["contents"]["frames"] for item in found["episodes"]] == [6, 6, 6]


def test_parts_come_to_the_report_of_the_whole_and_what_changed_since_is_looked_at_again(folder, tmp_path, capsys):
    with edited(folder / "1.h5") as file:
        file["gripper"][...] = 3.0
    command = [str(folder), "--frames", "0", "--workers", "1", "--json"]
    assert inspect.main([*command, str(tmp_path / "at_once.json")]) == 1
    at_once = lines(capsys)
    report = tmp_path / "report.json"
    assert [inspect.main([*command, str(report), "--shard", f"{part}/2"]) for part in range(2)] == [0, 1]
    assert not report.exists()
    lines(capsys)
    assert inspect.main([*command, str(report), "--quick"]) == 2
    assert "report.0_of_2.json is of a part that was asked with other flags" in capsys.readouterr().err

    assert inspect.main([*command, str(report)]) == 1
    assert lines(capsys) == at_once
    assert report.read_bytes() == (tmp_path / "at_once.json").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["at_once.json", "report.json"]

    assert inspect.main([*command, str(report), "--shard", "1/2"]) == 1
    with edited(folder / "1.h5") as file:
        file["gripper"][...] = 1.0
    lines(capsys)
    assert inspect.main([*command, str(report)]) == 0


def test_timestamps_that_count_control_steps_are_not_called_seconds(folder, capsys):
    arguments = ["--frames", "0", "--quick"]
    assert inspect.main([str(folder), *arguments]) == 0
    assert "18 frames, 0.00208 h by their timestamps" in "\n".join(lines(capsys))
    inspect.main([str(folder), *arguments, "--dataset-class", "PickPlaceCan"])  # sample_dt=1.0; other cameras
    assert "18 frames, 7.5 control steps by their timestamps" in "\n".join(lines(capsys))
    for path in folder.iterdir():
        with edited(path) as file:
            file["timestamp"][...] = np.arange(6)
    assert inspect.main([str(folder), *arguments]) == 0
    assert "18 frames, 15 control steps by their timestamps" in "\n".join(lines(capsys))
    assert inspect.main([str(folder / "0.h5"), *arguments]) == 0
    assert "6 frames, 5 control steps, 1 frames per step" in "\n".join(lines(capsys))


def test_warnings_of_a_set_are_counted_and_leave_the_exit_code_alone(folder, capsys):
    for path in folder.iterdir():
        with edited(path) as file:
            file["gripper"][...] = 0.5
    assert inspect.main([str(folder), "--frames", "0"]) == 0
    said = lines(capsys)
    assert [line for line in said if "warning" in line] == [
        f"{folder}/0.h5: warning, gripper: gripper is 0.5 in every frame; is its reading connected?",
        "  and 2 more warnings about gripper in other episodes; --json lists them",
    ]


def test_one_episode_is_described_whole(folder, capsys):
    path = folder / "0.h5"
    with edited(path) as file:
        file["subtask_description"], file["subtask_start_index"] = ["grasp it"], [2]
        file.attrs["prompt_text_1"] = "lift the cube"
        file.attrs["source"] = "a table top"
    assert inspect.main([str(path), "--frames", "0"]) == 0
    said = "\n".join(lines(capsys))
    for part in ("schema version 2", "6 frames, 2.5 s, 2 frames per second", "camera front  32 x 24; jpeg", "fixed",
                 "or   “lift the cube”",
                 "end-effector in front's image in 6 of 6 frames", "end-effector in wrist's image in 0 of 6 frames",
                 "from frame 2: “grasp it”", "source: a table top", "no faults"):  # fmt: skip
        assert part in said, part


def test_one_of_a_kind_and_unreadable_cameras_are_worded_so(folder, capsys):
    (folder / "2.h5").unlink()
    (folder / "1.h5").write_bytes(b"noise")
    with edited(folder / "0.h5") as file:
        file["wrist/rgb"][0] = file["wrist/rgb"][0][:-20]
    assert inspect.main([str(folder)]) == 1
    said = lines(capsys)
    assert "  one prompt" in said and "  1 x 1 end-effector; front 32 x 24 jpeg, wrist unreadable jpeg" in said
    assert said[-2] == "not drawn: all episodes have faults"
    assert inspect.main([str(folder), "--episode", "0"]) == 1
    assert lines(capsys)[-2] == f"{folder}/0.h5 is not drawn: it has faults"


@pytest.mark.parametrize("flag", ["--out", "--json"])
def test_a_place_that_cannot_be_written_is_wrong_usage(folder, tmp_path, capsys, flag):
    (tmp_path / "taken").write_text("")
    for place in (tmp_path / "taken" / "below", "/proc/below/it"):
        assert inspect.main([str(folder / "0.h5"), "--quick", flag, str(place)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "name another place" in err


def test_cameras_are_drawn_in_the_order_of_the_dataset_class(folder, tmp_path, monkeypatch):
    from data_utils import datasets
    from data_utils.inspect import pictures
    from data_utils.samples.dataset import H5DatasetMapBase

    class Wrists(H5DatasetMapBase):
        name = "Wrists"
        config = episodes.config(cameras=("wrist",), ee_ref_cams=(("wrist",),))

    drawn = []
    tile_row = pictures.tile_row
    monkeypatch.setattr(pictures, "tile_row", lambda tiles, labels: (drawn.append(labels), tile_row(tiles, labels))[1])
    monkeypatch.setitem(datasets.DATASETS, "Wrists", Wrists)
    path = str(folder / "0.h5")
    assert (
        inspect.main([path, "--frames", "1"]) == inspect.main([path, "--frames", "1", "--dataset-class", "Wrists"]) == 0
    )
    assert [[label.split()[0] for label in labels] for labels in drawn] == [
        ["front", "wrist"],
        ["wrist", "front"],
        ["wrist"],
    ]


def near(image, color):
    """How many pixels of (H, W, 3) have about this colour."""
    return int((np.abs(image.astype(int) - color).max(-1) < 40).sum())


def test_the_pictures_show_the_path(folder, tmp_path, monkeypatch):
    from data_utils import datasets
    from data_utils.samples.dataset import H5DatasetMapBase

    class Cubes(H5DatasetMapBase):
        name = "Cubes"
        config = episodes.config(image_hw=(64, 64))

    monkeypatch.setitem(datasets.DATASETS, "Cubes", Cubes)
    out = tmp_path / "out"
    arguments = [
        str(folder),
        "--episode",
        "1",
        "--out",
        str(out),
        "--frames",
        "2",
        "--video",
        "--dataset-class",
        "Cubes",
    ]
    assert inspect.main(arguments) == 0
    pictures = {path.name: cv2.imread(str(path))[..., ::-1] for path in out.glob("*.png")}
    assert set(pictures) == {"frames.png", "policy.png", "view_3d.png"}
    assert near(pictures["frames.png"], RECORDED) > 100 and near(pictures["policy.png"], RECORDED) > 50
    assert pictures["view_3d.png"].std() > 20 and pictures["view_3d.png"].shape[1] > 1000
    frames = [frame.to_ndarray(format="rgb24") for frame in av.open(str(out / "episode.mp4")).decode(video=0)]
    assert len(frames) == 6 and near(frames[0], RECORDED) > 50


def test_pictures_of_two_arms_masks_and_raw_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = episodes.write_episode(tmp_path / "a.h5", frames=4, num_arms=2, desired=True)
    with edited(path) as file:
        replace(file, "front/rgb", np.full((4, 3, 24, 32), 90, np.uint8))
        file["front/mask"] = np.zeros((4, 24, 32), bool)
        replace(file, "front/pose", camera_pose(0))
    assert inspect.main([str(path)]) == 0
    with Episode(path) as episode:
        assert episode.num_ee == 2
    assert (tmp_path / "inspect_out" / "a" / "view_3d.png").stat().st_size > 10_000


def test_speed_is_measured_for_each_camera(folder, capsys, monkeypatch):
    from data_utils.inspect import speed

    monkeypatch.setattr(speed.measure, "__defaults__", (0.1,))
    assert inspect.main([str(folder), "--frames", "0", "--speed"]) == 0
    said = "\n".join(lines(capsys))
    assert "samples/s in one process" in said and "ms to open an episode" in said
    assert "ms per random frame of wrist (jpeg)" in said


# -- resealing ------------------------------------------------------------------------------------------------------


def test_files_changed_on_purpose_are_resealed(folder, capsys):
    with h5py.File(folder / "1.h5", "r+") as file:
        file["gripper"][2] = 0.9
        file.attrs["prompt_text"] = "drop the cube"
    assert inspect.main([str(folder), "--reseal"]) == 0
    assert lines(capsys) == [
        f"{folder}/1.h5: resealed; had changed: attributes, gripper",
        "1 resealed, 2 agreed already, 0 left alone",
    ]
    assert inspect.main([str(folder), "--frames", "0"]) == 0
    with Episode(folder / "1.h5") as episode:
        assert episode.prompts == ["drop the cube"] and episode.gripper[2, 0] == pytest.approx(0.9)
    assert sorted(path.name for path in folder.iterdir()) == ["0.h5", "1.h5", "2.h5"]


def test_other_images_are_resealed_only_in_a_file_named_by_itself(folder, capsys):
    path = folder / "1.h5"
    with h5py.File(path, "r+") as file:
        file["front/rgb"][2] = file["front/rgb"][3]
    before = path.read_bytes()
    for arguments in ([str(folder)], [str(path), str(folder / "2.h5")], [str(folder / "1*.h5")]):
        assert inspect.main([*arguments, "--reseal"]) == 1
        said = lines(capsys)
        assert said[0].startswith(f"{path}: checksum: front/rgb (frame 2) differ from their checksums")
        assert said[0].endswith(f"python -m data_utils.inspect {path} --reseal") and path.read_bytes() == before
    assert inspect.main([str(path), "--reseal"]) == 0
    assert lines(capsys)[0] == f"{path}: resealed; had changed: front/rgb (frame 2)"
    assert inspect.main([str(path), "--frames", "0"]) == 0


def test_files_with_other_faults_or_without_checksums_are_not_resealed(folder, capsys):
    with h5py.File(folder / "0.h5", "r+") as file:  # the prompt's checksum hides the pose
        file.attrs["prompt_text"] = "drop the cube"
        file["ee_pose"][2] = np.nan
    with h5py.File(folder / "1.h5", "r+") as file:
        for name in ("schema_version", "checksums", "attributes_crc32"):
            del file.attrs[name]
    before = (folder / "0.h5").read_bytes()
    assert inspect.main([str(folder), "--reseal"]) == 1
    said = lines(capsys)
    assert said[0].startswith(f"{folder}/0.h5: pose: ee_pose at frame 2 is not finite; nothing is resealed")
    assert "1.h5: version: files of schema version 0 have no checksums" in said[1]
    assert said[-1] == "0 resealed, 1 agreed already, 2 left alone" and (folder / "0.h5").read_bytes() == before


# -- as a command ---------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    command = [sys.executable, "-m", "data_utils.inspect", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_a_file_that_crashes_the_reader_does_not_stop_the_run(folder, tmp_path, template, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, h5py\n"
        "original = h5py.File.__init__\n"
        "def init(self, name, *args, **options):\n"
        "    if str(name).endswith('crash.h5'):\n"
        "        ctypes.string_at(0)\n"
        "    original(self, name, *args, **options)\n"
        "h5py.File.__init__ = init\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shutil.copy(template, folder / "crash.h5")
    (folder / "noise.h5").write_bytes(np.random.default_rng(0).bytes(4000))
    done = run(folder, "--frames", "0", "--workers", "1")
    said = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert said[-1] == "2 of 5 episodes have faults (2 file)"
    assert "crash.h5: file: reading it crashes the HDF5 library: the process was killed by SIGSEGV" in said[-3]
    assert "noise.h5: file: " in said[-2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{set}", "--shard", "0/2"], "--shard leaves what it finds beside --json FILE"),
        (["nowhere"], "nowhere is no episode file"),
        ([], "which episodes?"),
        (["{set}", "--frames", "many"], "--frames"),
        (["{set}", "--frames", "-1"], "--frames is -1"),
        (["{set}", "--episode", "3"], "there are 3 episodes, counted from 0"),
        (["{set}", "--dataset-class", "Nothing"], "unknown dataset class 'Nothing'; known: LiberoSpatial"),
        (["{set}", "--workers", "0"], "workers is 0"),
        (["{set}", "--colour"], "inspect: unknown flag --colour; --help lists the flags"),
        (["{set}", "--frame", "3"], "inspect: unknown flag --frame; did you mean --frames?"),
        (["{set}", "--video", "--frames", "0"], "--video asks for a video"),
    ],
)
def test_wrong_usage_is_one_line(folder, capsys, arguments, said):
    assert inspect.main([argument.format(set=folder) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err, err


def test_the_command_as_a_user_types_it(folder, tmp_path):
    done = run(folder / "0.h5", "--out", tmp_path / "pictures", "--quick")
    assert done.returncode == 0 and done.stdout.endswith("no faults\n"), done.stderr
    assert (tmp_path / "pictures" / "frames.png").is_file()
    done = run("nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_how_well_rows_pair_with_the_frames_of_a_video_is_said(tmp_path, capsys):
    for camera in ("front", "wrist"):
        write_video(tmp_path / f"{camera}.mp4", 12)
    write_episode(tmp_path / "a.h5", episode_data())
    with edited(tmp_path / "a.h5") as file:
        file["front/video_time"][...] += 0.012
        file["wrist/video_time"][5] = file["wrist/video_time"][4] + 0.03
    inspect.main([str(tmp_path / "a.h5"), "--frames", "0", "--workers", "1"])
    said = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  camera ")}
    assert "rows within 12 ms of their frames" in said["front"] and "row before" not in said["front"]
    assert "rows within 30 ms of their frames, 1 with the frame of the row before" in said["wrist"]
