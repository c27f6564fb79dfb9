"""SE(3) states and 10-dim actions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.model.action_transform import action_to_state, state_errors, state_to_action
from apt.model.layers.rotations import invert_transform, make_transform, rotation_from_6d, rotation_from_quaternion


def random_poses(shape: tuple[int, ...], generator: torch.Generator, spread: float = 1.0) -> torch.Tensor:
    quaternion = torch.randn(*shape, 4, generator=generator)
    return make_transform(rotation_from_quaternion(quaternion), spread * torch.randn(*shape, 3, generator=generator))


def random_states(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    poses = random_poses(shape, generator).flatten(-2)
    return torch.cat([poses, torch.rand(*shape, 1, generator=generator)], dim=-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.lists(st.integers(1, 4), min_size=0, max_size=3))
def test_states_survive_the_round_trip(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(shape)
    states, ee, ref = random_states(shape, generator), random_poses(shape, generator), random_poses(shape, generator)
    torch.testing.assert_close(action_to_state(state_to_action(states, ee, ref), ee, ref), states, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_actions_do_not_depend_on_the_choice_of_world(seed):
    generator = torch.Generator().manual_seed(seed)
    states, ee, ref = random_states((5,), generator), random_poses((5,), generator), random_poses((5,), generator)
    new_from_old = random_poses((1,), generator)
    moved = torch.cat([(new_from_old @ states[..., :16].unflatten(-1, (4, 4))).flatten(-2), states[..., 16:]], -1)
    torch.testing.assert_close(
        state_to_action(moved, new_from_old @ ee, new_from_old @ ref), state_to_action(states, ee, ref),
        atol=2e-5, rtol=1e-4,
    )  # fmt: skip


def test_staying_put_is_zero_motion_and_the_first_rows_of_the_identity():
    ee = torch.eye(4)
    state = torch.cat([ee.flatten(), torch.tensor([0.5])])
    action = state_to_action(state, ee, random_poses((), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(action, torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 0, 0.0]), atol=1e-6, rtol=0)


def test_translation_is_expressed_along_the_reference_cameras_axes():
    ref = torch.eye(4)
    ref[:3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # camera x is world y
    state = torch.eye(4)
    state[1, 3] = 0.3  # moves along world y
    action = state_to_action(torch.cat([state.flatten(), torch.ones(1)]), torch.eye(4), ref)
    torch.testing.assert_close(action[:3], torch.tensor([0.3, 0.0, 0.0]))
    assert action[9] == 1.0


def test_a_six_dimensional_rotation_is_the_first_two_rows_and_gets_orthonormalised():
    rotation = rotation_from_6d(torch.tensor([2.0, 0, 0, 0.5, 3.0, 0]))
    torch.testing.assert_close(rotation, torch.eye(3))


def test_inverse_of_a_rigid_transform():
    poses = random_poses((7,), torch.Generator().manual_seed(1))
    torch.testing.assert_close(invert_transform(poses) @ poses, torch.eye(4).expand(7, 4, 4), atol=1e-5, rtol=0)


def test_states_are_as_far_apart_as_they_were_moved_and_turned():
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[0.0, -1], [1, 0]])  # by 90 degrees
    turn[:3, 3] = torch.tensor([0.3, 0, 0.4])
    states = [
        torch.cat([pose.flatten(), torch.tensor([gripper])]) for pose, gripper in ((torch.eye(4), 0.4), (turn, 1))
    ]
    position, rotation, gripper = state_errors(*states)
    assert (round(position.item(), 5), round(rotation.item(), 3), gripper.item()) == (0.5, 90.0, True)
    same = random_states((5, 2), torch.Generator().manual_seed(0)).double()
    position, rotation, gripper = state_errors(same, same)
    assert position.shape == (5, 2) and position.max() == 0 and rotation.max() < 0.1 and not gripper.any()
