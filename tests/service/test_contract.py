"""What a policy wants to be shown, and what is said about frames that differ from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.infer.contract import ContractError, FirstFrames, ObservationContract
from data_utils.datasets import DATASETS, AgibotWorldAlpha, AlohaPickPlace, InternM1Franka, PickPlaceCan

ALOHA = ObservationContract(AlohaPickPlace.config)  # head_cam, rh_cam; 0.1 s
TWO_ARMS = ObservationContract(AgibotWorldAlpha.config)


def frame_for(contract: ObservationContract, time: float = 0.0) -> dict:
    """A blank frame that meets the contract."""
    arms = contract.config.num_arms
    camera = {
        "camera": {"width": 8, "height": 6, "K": np.diag([8.0, 8.0, 1.0])},
        "data": {"color": np.zeros((6, 8, 3), np.uint8), "wcT": np.eye(4)},
    }
    frame = {"ee_pose": np.stack([np.eye(4)] * arms), "gripper": np.ones(arms), "timestamp": time}
    return frame | {name: camera for name in contract.config.cameras}


@pytest.mark.parametrize("name", DATASETS)
def test_every_robots_contract_is_plain_data_that_its_frames_meet(name):
    contract = ObservationContract(DATASETS[name].config)
    published = contract.to_dict()
    assert json.loads(json.dumps(published)) == published
    assert [camera["name"] for camera in published["cameras"]] == list(DATASETS[name].config.cameras)
    assert contract.differences(frame_for(contract)) == []


def test_the_contract_states_the_clock_and_what_is_predicted():
    published = ALOHA.to_dict()
    assert published["clock"] == {"unit": "seconds", "time_step": 0.1}
    assert published["future"] == {"states": 32, "time_steps_between": 2}
    assert published["history"]["fewest_frames"] == 1
    assert ObservationContract(PickPlaceCan.config).to_dict()["clock"]["unit"] == "control steps"
    assert ObservationContract(InternM1Franka.config).to_dict()["history"]["fewest_frames"] == 2  # measures its step


def test_one_message_lists_everything_that_differs():
    frame = frame_for(ALOHA)
    frame["wrist"] = frame.pop("rh_cam")
    frame["head_cam"] = {**frame["head_cam"], "data": {"color": np.zeros((6, 8), np.uint8), "wcT": np.eye(4)}}
    frame["ee_pose"] = np.stack([np.eye(4)] * 2)
    del frame["timestamp"]
    with pytest.raises(ContractError) as caught:
        FirstFrames(ALOHA).check([frame], prompt_missing=True)
    for named in ("'rh_cam' is missing", "'wrist' is not one", "head_cam.data.color", "ee_pose", "timestamp", "prompt"):
        assert named in str(caught.value), named


def test_a_one_armed_robot_may_use_a_two_armed_policy_but_not_the_other_way_round():
    assert TWO_ARMS.differences(frame_for(TWO_ARMS) | {"ee_pose": np.eye(4), "gripper": 0.5}) == []
    assert len(ALOHA.differences(frame_for(ALOHA) | {"ee_pose": np.stack([np.eye(4)] * 2)})) == 1


def test_notes_of_the_robot_in_a_frame_do_no_harm():
    assert ALOHA.differences(frame_for(ALOHA) | {"joint_angles": np.zeros(7), "operator": "Ada"}) == []


@pytest.mark.parametrize(
    "contract, gap, wrong",
    [
        (ALOHA, 1 / 30, False),  # a faster camera
        (ALOHA, 1.6, False),  # a frame per query
        (ALOHA, 100.0, True),  # milliseconds
        (ALOHA, 1e8, True),  # nanoseconds
        (ALOHA, 1e-4, True),
        (ObservationContract(PickPlaceCan.config), 0.05, True),  # seconds where control steps are counted
        (ObservationContract(PickPlaceCan.config), 8.0, False),
        (ObservationContract(InternM1Franka.config), 1e8, False),  # measures whatever step comes
    ],
)
@pytest.mark.parametrize("start", [0.0, 1.75e9])
def test_two_frames_tell_a_clock_in_another_unit(contract, gap, wrong, start):
    first = FirstFrames(contract)
    first.check([frame_for(contract, start)])
    first.accept([frame_for(contract, start)])
    if wrong:
        with pytest.raises(ContractError, match=r"timestamp: .* reset\(\) first"):
            first.check([frame_for(contract, start + gap)])
        first.restart()
    first.check([frame_for(contract, start + gap)])


def test_frames_are_the_planners_to_judge_once_two_have_met_the_contract():
    first = FirstFrames(ALOHA)
    for time in (0.0, 0.1):
        first.check([frame_for(ALOHA, time)])
        first.accept([frame_for(ALOHA, time)])
    first.check([{"timestamp": 1e9}])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["head_cam", "rh_cam", "ee_pose", "gripper", "timestamp", "other"])
PATHS = st.sampled_from(
    [
        (),
        ("camera",),
        ("data",),
        ("camera", "K"),
        ("camera", "width"),
        ("data", "color"),
        ("data", "wcT"),
        ("data", "seg"),
    ]
    + [("data", "encoding"), ("model",)]
)


@given(key=KEYS, path=PATHS, value=VALUES)
def test_whatever_a_frame_holds_the_differences_can_be_told(key, path, value):
    frame = frame_for(ALOHA)
    if path and key in ALOHA.config.cameras:
        frame[key] = {part: dict(held) for part, held in frame[key].items()}
        holder = frame[key]
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = value
    else:
        frame[key] = value
    assert all(isinstance(line, str) and line for line in ALOHA.differences(frame))
