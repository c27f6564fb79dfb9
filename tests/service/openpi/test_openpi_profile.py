"""Foreign observations: LIBERO's as openpi's client sends them, a rig of one's own, and what is wrong with either."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from apt.infer.openpi_profile import PROFILES, ProfileReader
from apt.infer.openpi_service import OpenpiServer, OpenpiServiceConfig, main
from apt.infer.openpi_session import OpenpiSession
from apt.infer.planner import TrajPlanner
from apt.infer.service_session import Checkpoint, PolicyService
from data_utils.cli import CommandLineError
from data_utils.geometry.resample import at_control_steps
from tests.service.helpers import STEPS

RIG = """
arms: [{pose: {form: xyz+quat, order: xyzw, values: "pose"}, gripper: {values: "grip", closed: 0, open: 100}}]
cameras:
  front:
    frames: camera/front
    K: {form: fx+fy+cx+cy, values: [600, 600, 640, 360], size: [1280, 720]}
    axes: opencv
    world_from_cam: {form: xyz+rotvec, values: [0, 0, 1, 0, 0, 0]}
letterboxed: true
prompt: task
"""


def pose(position=(0.1, 0.0, 1.2), turned=(np.pi, 0.0, 0.0)) -> np.ndarray:
    world_from_ee = np.eye(4)
    world_from_ee[:3, :3] = Rotation.from_rotvec(turned).as_matrix()
    world_from_ee[:3, 3] = position
    return world_from_ee


def libero_observation(world_from_ee: np.ndarray, prompt: str = "pick up the milk", size: int = 224) -> dict:
    """As openpi's examples/libero sends it."""
    ee_from_hand = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    hand = Rotation.from_matrix(world_from_ee[:3, :3] @ ee_from_hand).as_rotvec()
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    return {
        "observation/image": image,
        "observation/wrist_image": image[::-1].copy(),
        "observation/state": np.concatenate([world_from_ee[:3, 3], hand, [0.03, -0.03]]),
        "prompt": prompt,
    }


# -- frames -----------------------------------------------------------------------------------------------------------


def test_liberos_observation_becomes_a_frame_with_the_calibration_of_its_scene():
    world_from_ee = pose(turned=(3.0, 0.3, -0.2))
    seen = libero_observation(world_from_ee)
    frame = ProfileReader("libero:floor").frame(seen)
    np.testing.assert_allclose(frame["ee_pose"][0], world_from_ee, atol=1e-6)
    np.testing.assert_allclose(frame["gripper"], [0.75])
    fixed, wrist = frame["agentview"], frame["eye_in_hand"]
    np.testing.assert_array_equal(fixed["data"]["color"], seen["observation/image"][:, ::-1])
    assert fixed["camera"]["K"][0, 0] == pytest.approx(309.0193 * 224 / 256, abs=1e-3)
    assert wrist["camera"]["K"][0, 0] == pytest.approx(166.8128 * 224 / 256, abs=1e-3)
    assert fixed["camera"]["K"][0, 2] == fixed["camera"]["K"][1, 2] == 112
    np.testing.assert_allclose(fixed["data"]["wcT"][:3, 3], [0.896577, 0, 0.65], atol=1e-5)
    np.testing.assert_allclose(fixed["data"]["wcT"][:3, 2], [-0.848765, 0, -0.528770], atol=1e-5)  # where it looks
    np.testing.assert_allclose(wrist["data"]["wcT"] @ [0, 0.05, 0.097, 1], world_from_ee @ [0, 0, 0, 1], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1280), st.floats(0, 720), st.integers(40, 400), st.integers(40, 400))
def test_a_fitted_images_intrinsics_are_of_what_it_shows(tmp_path_factory, u, v, width, height):
    file = tmp_path_factory.mktemp("rig") / "rig.yaml"
    file.write_text(RIG)
    seen = {
        "pose": [0, 0, 0, 0, 0, 0, 1],
        "grip": 50,
        "camera/front": np.zeros((height, width, 3), np.uint8),
        "task": "",
    }
    K = ProfileReader(str(file)).frame(seen)["front"]["camera"]["K"]
    shrunk = max(1280 / width, 720 / height)
    shown = np.floor(np.array([1280, 720]) / shrunk)
    border = (np.array([width, height]) - shown) // 2
    expected = np.array([u, v]) * shown / [1280, 720] + border
    ray = np.array([(u - 640) / 600, (v - 360) / 600, 1.0])
    np.testing.assert_allclose((K @ ray)[:2], expected, atol=1e-6)


def test_images_with_channels_first_and_of_numbers_to_one_are_understood_and_others_refused():
    reader, seen = ProfileReader("libero:study"), libero_observation(pose())
    plain = reader.frame(seen)["agentview"]["data"]["color"]
    image = seen["observation/image"]
    for other in (image.transpose(2, 0, 1), image.astype(np.float32) / 255):
        again = reader.frame({**seen, "observation/image": other})["agentview"]["data"]["color"]
        np.testing.assert_array_equal(again, plain)
    for wrong, says in (
        (image.astype(float), "beyond 0 to 1"),
        (image[..., 0], "wanted an image"),
        ("no", "wanted an"),
    ):
        with pytest.raises(ValueError, match=f"observation/image .*{says}"):
            reader.frame({**seen, "observation/image": wrong})


def test_what_an_observation_lacks_is_named_with_what_it_has():
    reader, seen = ProfileReader("libero:tabletop"), libero_observation(pose())
    del seen["observation/wrist_image"]
    with pytest.raises(ValueError, match="no column 'observation/wrist_image'.*there are observation/image, "):
        reader.frame(seen)
    with pytest.raises(ValueError, match=r"'observation/state' has 3 numbers, not 6"):
        reader.frame(libero_observation(pose()) | {"observation/state": [0.0, 0.0, 0.0]})
    with pytest.raises(ValueError, match="not finite"):
        reader.frame(libero_observation(pose()) | {"observation/state": np.full(8, np.nan)})


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_profile_that_cannot_be_used_is_refused_by_what_is_wrong_in_it(tmp_path):
    for name, says in (
        ("libero", "none was named; append one of its scenes: :tabletop, :floor"),
        ("libero:moon", "there is no 'moon'"),
        ("aloha", "neither a file nor one that is shipped .droid, libero."),
        ("droid", "fr3.urdf, which is not beside it; put it there.*where this is a template, copy it"),
    ):
        with pytest.raises(ValueError, match=says):
            ProfileReader(name)
    rig = tmp_path / "rig.yaml"
    for change, says in (
        (("letterboxed: true", "letterboxd: true"), "line 9.*unknown field 'letterboxd'"),
        ((", size: [1280, 720]", ""), "has no size"),
        (("prompt: task", "mirrored: [back]"), "mirrored names 'back'"),
        (("prompt: task", "actions: {kind: joints}"), "kind is 'joints'; wanted poses or deltas"),
        (("prompt: task", "actions: {kind: deltas, translation: 0.05}"), "deltas want translation"),
    ):
        rig.write_text(RIG.replace(*change))
        with pytest.raises(ValueError, match=says):
            ProfileReader(str(rig))
    rig.write_text(RIG)
    with pytest.raises(ValueError, match="has no scenes"):
        ProfileReader(f"{rig}:floor")


def test_the_template_of_droid_is_whole_but_for_the_rigs_own_files():
    text = (PROFILES / "droid.yaml").read_text(encoding="utf-8")
    assert text.count("# yours") == 4 and "exterior_image_1_left" in text


# -- actions ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-0.04, 0.04)] * 3, *[st.floats(-0.2, 0.2)] * 3), min_size=1, max_size=6))
def test_deltas_add_up_to_the_poses_that_they_are_of(steps):
    here = pose()
    poses, now = [], here
    for step in np.array(steps):
        now = now.copy()
        now[:3, :3] = Rotation.from_rotvec(step[3:]).as_matrix() @ now[:3, :3]
        now[:3, 3] += step[:3]
        poses.append(now)
    rows = ProfileReader("libero:floor").deltas(here, np.array(poses), np.linspace(0, 1, len(poses)))
    assert rows.shape == (len(poses), 7) and np.abs(rows).max() <= 1
    assert (rows[:, 6] == np.where(np.linspace(0, 1, len(poses)) >= 0.5, -1, 1)).all()
    reached = here.copy()
    for row in rows.astype(float):
        reached[:3, :3] = Rotation.from_rotvec(0.5 * row[3:6]).as_matrix() @ reached[:3, :3]
        reached[:3, 3] += 0.05 * row[:3]
    np.testing.assert_allclose(reached, poses[-1], atol=1e-5)


def test_a_chunk_of_longer_steps_is_told_for_every_control_step():
    poses = np.stack([pose((x, 0.0, 1.0)) for x in (0.2, 0.4)])
    steps, openness = at_control_steps(10.0, np.array([12.0, 14.0]), poses, np.array([1.0, 0.0]))
    np.testing.assert_allclose(steps[:, 0, 3], [0.2, 0.2, 0.3, 0.4], atol=1e-9)  # nothing is known before the first
    np.testing.assert_allclose(openness, [1, 1, 0.5, 0])


# -- a session --------------------------------------------------------------------------------------------------------


@pytest.fixture
def libero_service(policy) -> PolicyService:
    """A policy that looks at LIBERO's cameras and counts control steps."""
    config = policy.train_config.data_configs()[0]
    config = dataclasses.replace(
        config, cameras=("agentview", "eye_in_hand"), wrist_cameras=("eye_in_hand",), sample_dt=1.0, record_dt=None,
        ee_ref_cams=(("agentview", "eye_in_hand"),), num_obs=1, ee_indices=(0,),
    )  # fmt: skip
    planner = TrajPlanner.of_policy(policy, ensemble=0, steps=STEPS, config=config)
    return PolicyService(planner, Checkpoint("libero", "", False), "test", list)


def test_a_session_answers_liberos_client_with_what_it_executes(libero_service):
    session = OpenpiSession(libero_service, 5.0, ProfileReader("libero:floor"))
    told = session.metadata()
    assert told["profile"] == "libero:floor" and "1 closes" in told["actions"]
    here = pose()
    first = session.answer(libero_observation(here))
    rows = first["actions"]
    assert rows.shape[1] == 7 and len(rows) >= 5 and set(rows[:, 6]) <= {-1.0, 1.0} and np.abs(rows).max() <= 1
    assert len(first["poses"]) == len(first["times"]) == len(rows)
    np.testing.assert_allclose(np.diff(first["times"]), 1.0)
    moved = np.clip((first["poses"][0, 0, :3, 3] - here[:3, 3]) / 0.05, -1, 1)
    np.testing.assert_allclose(rows[0, :3], moved, atol=1e-4)
    second = session.answer(libero_observation(here))
    assert second["times"][0] - first["times"][0] == 5.0  # it executes five before it asks again


def test_another_prompt_or_a_jump_of_the_arm_begins_an_episode(libero_service, monkeypatch):
    session = OpenpiSession(libero_service, 5.0, ProfileReader("libero:floor"))
    resets = []
    monkeypatch.setattr(session._session, "reset", lambda seed: resets.append(seed))
    far = pose((0.5, 0.3, 1.2))
    for world_from_ee, prompt, begun in (
        (pose(), "a", 1),
        (pose(), "a", 1),
        (pose(), "b", 2),
        (far, "b", 3),
        (far, "b", 3),
    ):
        session.answer(libero_observation(world_from_ee, prompt))
        assert len(resets) == begun


def test_a_profile_that_does_not_suit_the_policy_is_refused_before_it_is_served(libero_service, tmp_path, capsys):
    rig = tmp_path / "rig.yaml"
    rig.write_text(RIG)
    with pytest.raises(CommandLineError, match="has no camera agentview, which the policy looks at; it has front"):
        OpenpiServer(libero_service, OpenpiServiceConfig(), None, ProfileReader(str(rig)))
    libero_service.planner.set_config(
        dataclasses.replace(libero_service.planner.get_config(), sample_dt=0.1, record_dt=0.1)
    )
    with pytest.raises(CommandLineError, match="answers with a row per control step; the policy counts seconds"):
        OpenpiServer(libero_service, OpenpiServiceConfig(), None, ProfileReader("libero:floor"))


def test_the_service_says_what_is_wrong_with_a_profile_before_it_loads(checkpoint, capsys):
    assert main(["--ckpt", str(checkpoint), "--profile", "libero"]) == 2
    assert "append one of its scenes" in capsys.readouterr().err
