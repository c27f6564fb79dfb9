"""Every fault of an episode file is found, each by its rule, whatever else is wrong."""

import re

import cv2
import h5py
import numpy as np
import pytest

from data_utils.checks.faults import find_faults
from data_utils.checks.unusual import find_warnings
from data_utils.errors import DataError, Fault
from data_utils.h5io import Episode, write_episode
from data_utils.video import VideoCache
from tests.data import episodes
from tests.data.episodes import edited
from tests.data.test_video_episodes import episode_data, write_video
from tests.data.test_video_readers import encode, packets


@pytest.fixture
def path(tmp_path):
    return episodes.write_episode(tmp_path / "a.h5", frames=12, desired=True)


def replace(file, key, value):
    if key in file:
        del file[key]
    file[key] = value


def rules(path, **options):
    return [fault.rule for fault in find_faults(path, **options)]


def test_a_good_episode_has_no_faults(path):
    assert find_faults(path) == find_faults(path, deep=False) == []


def rotate(file, key, frame):
    file[key][frame] = np.diag([1.0, 1.0, -1.0, 1.0])


SMALL_MASK = np.ones((12, 20, 32), bool)
# What is done to a file, and the one fault that follows: rule, beginning of the message, change.
CHANGES = {
    "NaN pose": ("pose", "ee_pose at frame 3", lambda f: f["ee_pose"].__setitem__((3, 0, 0, 3), np.nan)),
    "mirrored pose": ("rotation", "ee_pose at frame 2", lambda f: rotate(f, "ee_pose", 2)),
    "command": ("rotation", "ee_pose_desired at frame 4", lambda f: rotate(f, "ee_pose_desired", 4)),
    "camera pose": ("pose", "wrist/pose at frame 5", lambda f: f["wrist/pose"].__setitem__(5, np.inf)),
    "fixed camera": ("rotation", "front/pose", lambda f: replace(f, "front/pose", 2 * np.eye(4))),
    "focal length": ("intrinsics", "front/K", lambda f: f["front/K"].__setitem__((0, 0), -30.0)),
    "gripper": ("gripper", r"gripper at frame 7 is \[85.0\]", lambda f: f["gripper"].__setitem__((7, 0), 85.0)),
    "gripper command": ("gripper", "gripper_desired at frame 1", lambda f: f["gripper_desired"].__setitem__(1, np.nan)),
    "time": ("time", "timestamp at frame 6 is 0.1 s, after 2.5 s", lambda f: f["timestamp"].__setitem__(6, 0.1)),
    "stopped clock": ("time", "timestamp is 0.0 at every frame", lambda f: replace(f, "timestamp", np.zeros(12))),
    "JPEG": ("image", "wrist/rgb at frame 8 is not a whole JPEG", lambda f: cut(f, 8)),
    "size": ("image", r"wrist/rgb at frame 9 is \(20, 20\)", lambda f: other_size(f, 9)),
    "mask": ("mask", r"front/mask is \(20, 32\), the images", lambda f: replace(f, "front/mask", SMALL_MASK)),
    "sub-task": ("subtask", "subtask_start_index is", lambda f: subtasks(f, ["a"], [12])),
    "empty sub-task": ("subtask", "subtask_description 1 ", lambda f: subtasks(f, ["a", " "], [0, 3])),
    "arms": ("arms", "attribute ee_indices is", lambda f: f.attrs.__setitem__("ee_indices", [3])),
    "prompt": ("prompt", "attribute prompt_text is missing", lambda f: f.attrs.pop("prompt_text")),
    "version": ("version", "schema_version is 9", lambda f: f.attrs.__setitem__("schema_version", 9)),
    "shape": ("schema", "gripper has shape", lambda f: replace(f, "gripper", np.zeros((5, 1), np.float32))),
}  # fmt: skip


def cut(file, frame):
    file["wrist/rgb"][frame] = file["wrist/rgb"][frame][:-30]


def other_size(file, frame):
    file["wrist/rgb"][frame] = cv2.imencode(".jpg", np.zeros((20, 20, 3), np.uint8))[1].reshape(-1)


def subtasks(file, texts, starts):
    file["subtask_description"], file["subtask_start_index"] = texts, starts


@pytest.mark.parametrize("kind", CHANGES)
def test_each_rule_names_its_fault(path, kind):
    rule, message, change = CHANGES[kind]
    with edited(path) as file:
        change(file)
    (fault,) = find_faults(path)
    assert fault.rule == rule
    assert re.match(f"(attribute )?{message}", fault.message), fault
    assert "\n" not in fault.message and str(path) not in fault.message


@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind not in ("version", "empty sub-task")])
def test_each_fault_is_found_in_files_without_a_version(path, kind):
    with edited(path) as file:
        for name in ("schema_version", "checksums", "attributes_crc32"):
            del file.attrs[name]
        CHANGES[kind][2](file)
    assert rules(path) == [CHANGES[kind][0]]


def test_all_faults_of_a_file_are_found_at_once(path):
    kinds = ["NaN pose", "camera pose", "focal length", "gripper", "time", "JPEG", "mask", "arms", "empty sub-task"]
    with edited(path) as file:
        for kind in kinds:
            CHANGES[kind][2](file)
    assert sorted(rules(path)) == sorted(CHANGES[kind][0] for kind in kinds)


def test_whatever_training_refuses_is_a_fault(path):
    """The accessors are the reference: no change above passes all of them, but for the empty text of a sub-task."""
    whole = path.read_bytes()
    for kind, (rule, _, change) in CHANGES.items():
        path.write_bytes(whole)
        with edited(path) as file:
            change(file)
        if kind in ("empty sub-task", "mask"):  # the mask is refused where it meets its image
            continue
        with pytest.raises(DataError) as caught, Episode(path) as episode:
            _ = episode.world_from_ee, episode.gripper, episode.world_from_ee_desired, episode.gripper_desired
            _ = episode.timestamps, episode.ee_indices, episode.subtasks
            for camera in episode.cameras:
                for frame in range(len(episode)):
                    _ = episode.rgb(camera, frame), episode.K(camera, frame), episode.world_from_cam(camera, frame)
        assert caught.value.rule == rule, kind


def test_many_bad_frames_are_counted_not_listed(path):
    with edited(path) as file:
        file["ee_pose"][2:] = np.nan
        file["ee_pose"][1] = 2 * np.eye(4)
    faults = find_faults(path)
    assert [fault.rule for fault in faults] == ["rotation", *["pose"] * 6]
    assert faults[-1] == Fault("pose", "ee_pose: and 5 more frames, the last one 11")


def test_checksums_are_faults_beside_what_they_hide(path):
    with h5py.File(path, "r+") as file:
        file["ee_pose"][3] = np.nan
        file["front/rgb"][1] = file["front/rgb"][2]
        file["extra"] = np.zeros(3)
    assert rules(path) == ["checksum", "pose", "checksum"]
    assert rules(path, deep=False) == ["checksum", "pose"]  # frame 1 is not among those decoded


def test_arrays_that_are_gone_or_that_nothing_reads_are_checked_too(path):
    with edited(path) as file:
        file["joints"] = np.zeros((12, 7))
    with h5py.File(path, "r+") as file:
        file["joints"][0] = 1.0
        del file["wrist"]
    again = "record the episode again"
    assert find_faults(path) == [
        Fault("checksum", f"joints is not what was written; {again}"),
        Fault("checksum", f"wrist was written and is gone; {again}"),
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_camera_whose_group_cannot_be_opened_is_not_passed_over(path, legacy):
    with edited(path) as file:
        if legacy:
            for name in ("schema_version", "checksums", "attributes_crc32"):
                del file.attrs[name]
        at = h5py.h5o.get_info(file["wrist"].id).addr
    data = bytearray(path.read_bytes())
    data[at : at + 16] = bytes(16)
    path.write_bytes(data)
    assert find_faults(path) == [Fault("file", "wrist cannot be opened; the file is damaged")]


def test_a_dataset_class_wants_its_cameras_and_arms(path):
    faults = find_faults(path, cameras=("front", "top"), ee_indices=(0, 1))
    assert [fault.rule for fault in faults] == ["arms", "camera"] and "top camera is missing" in faults[1].message
    with edited(path) as file:
        file.attrs["ee_indices"] = [0]
    assert rules(path, ee_indices=(0, 1)) == []  # the file's own choice counts
    assert rules(path, cameras=("front",), ee_indices=(0,)) == []


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_truncated_file_is_a_fault(path, length):
    data = path.read_bytes()
    path.write_bytes(data[: length if length >= 0 else len(data) // 2])
    assert rules(path) == ["file"]


# -- videos ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def filmed(tmp_path):
    """An episode of 12 frames whose cameras are videos of 12 frames."""
    for camera in episodes.CAMERAS:
        write_video(tmp_path / f"{camera}.mp4", 12)
    write_episode(tmp_path / "a.h5", episode_data())
    return tmp_path / "a.h5"


def test_videos_are_there_whole_and_long_enough(filmed):
    assert find_faults(filmed) == find_faults(filmed, deep=False) == []
    write_video(filmed.with_name("front.mp4"), 9)
    for deep in (True, False):
        faults = find_faults(filmed, deep=deep)
        assert [fault.rule for fault in faults] == ["video"] * 3
        assert "front/rgb at frame 9 is 0.900 s of" in faults[0].message and "spans 0.000 to 0.800" in faults[0].message
    filmed.with_name("wrist.mp4").unlink()
    assert "wrist.mp4: no such video" in find_faults(filmed)[-1].message
    assert rules(filmed, video_root="/nowhere") == ["video"] * 2


def test_damage_inside_a_video_is_found_when_every_frame_is_decoded(filmed):
    video = encode(filmed.with_name("front.mp4"), ticks=np.arange(12) * 60)
    assert find_faults(filmed) == []
    position, size = packets(video)[8]
    data = bytearray(video.read_bytes())
    data[position + size // 4 : position + size] = np.random.default_rng(0).bytes(size - size // 4)
    video.write_bytes(data)
    faults = find_faults(filmed)
    assert faults and {fault.rule for fault in faults} == {"video"} and "front.mp4" in faults[0].message


# -- warnings -------------------------------------------------------------------------------------------------------


def warnings(path):
    assert find_faults(path) == []
    return {warning.rule: warning.message for warning in find_warnings(path, VideoCache("pyav"))}


def test_what_is_allowed_but_hardly_meant_is_a_warning(path):
    assert set(warnings(path)) == {"pose"}  # the test robot moves behind its cameras
    with edited(path) as file:
        turned = np.diag([1.0, -1.0, -1.0, 1.0])
        turned[:3, 3] = (0.5, 0.0, 4.0)
        replace(file, "front/pose", turned)  # looks down
    assert warnings(path) == {}
    with edited(path) as file:
        tilted = np.eye(4)
        tilted[:3, :3], tilted[:3, 3] = turned[[1, 2, 0], :3], turned[:3, 3]  # as from another order of a quaternion
        replace(file, "front/pose", tilted)
    assert "end-effector is in front's image in 0, in wrist's image in 0 of 12 frames" in warnings(path)["pose"]
    with edited(path) as file:
        replace(file, "front/pose", turned)
    with edited(path) as file:
        file["ee_pose"][:, 0, 0, 3] *= 1000
        file["gripper"][...] = 0.0
        file["timestamp"][6:] += 100.0
        file["front/K"][0, 2] = 30.0
        file.attrs["prompt_text"] = "pick_up_the_cube"
    found = warnings(path)
    assert set(found) == {"pose", "gripper", "time", "intrinsics", "prompt"}
    assert "millimetres" in find_warnings(path, VideoCache("pyav"))[1].message
    assert "0 in every frame" in found["gripper"] and "100.5 s after frame 5" in found["time"]
    assert "(30, 12) is far from the middle of the image of 32 x 24" in found["intrinsics"]
