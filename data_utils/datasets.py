"""The datasets this project knows, with the numbers of each robot and recording."""

from __future__ import annotations

import dataclasses

from data_utils.config import DataConfig
from data_utils.samples.dataset import H5DatasetMapBase

_LIBERO = DataConfig(
    cameras=("agentview", "eye_in_hand"),
    wrist_cameras=("eye_in_hand",),
    ee_ref_cams=(("agentview", "eye_in_hand"),),
    sample_dt=1.0,  # the unit of time is one environment step
    strip_scene_prefix=True,
)

_INTERNA1_TWO_ARMS = DataConfig(
    cameras=("head_cam", "lh_cam", "rh_cam"),
    wrist_cameras=("lh_cam", "rh_cam"),
    ee_indices=(0, 1),
    ee_ref_cams=(("head_cam", "lh_cam"), ("head_cam", "rh_cam")),
    record_dt=1 / 10,
    sample_dt=1 / 10,
    sample_state_gaps=2,
)

_ALOHA = DataConfig(
    cameras=("head_cam", "rh_cam"),
    wrist_cameras=("rh_cam",),
    ee_ref_cams=(("head_cam", "rh_cam"),),
    record_dt=1 / 10,
    sample_dt=1 / 10,
    sample_state_gaps=2,
)


class LiberoSpatial(H5DatasetMapBase):
    name = "LiberoSpatial"
    config = _LIBERO


class LiberoObject(H5DatasetMapBase):
    name = "LiberoObject"
    config = _LIBERO


class LiberoGoal(H5DatasetMapBase):
    name = "LiberoGoal"
    config = _LIBERO


class Libero10(H5DatasetMapBase):
    name = "Libero10"
    config = _LIBERO


class Droid(H5DatasetMapBase):
    """Franka with a Robotiq gripper; the recorded origin is the flange, the policy's is between the fingers."""

    name = "Droid"
    half_in_stage0 = True
    config = DataConfig(
        cameras=("exterior_2_left", "exterior_1_left", "wrist_left"),
        wrist_cameras=("wrist_left",),
        ee_ref_cams=(("exterior_2_left", "exterior_1_left", "wrist_left"),),
        record_dt=1 / 15,
        sample_dt=1 / 15,
        sample_state_gaps=2,
        ee_offset_z=0.15,
    )


class AgibotWorldAlpha(H5DatasetMapBase):
    """Two-armed; the file's end-effector 0 is the head."""

    name = "AgibotWorldAlpha"
    half_in_stage0 = True
    config = DataConfig(
        cameras=("head_cam", "left_cam", "right_cam"),
        wrist_cameras=("left_cam", "right_cam"),
        ee_indices=(1, 2),
        ee_ref_cams=(("head_cam", "left_cam"), ("head_cam", "right_cam")),
        record_dt=1 / 30,
        sample_dt=1 / 30,
        sample_state_gaps=3,
        ee_offset_z=0.08,
    )


class InternM1Franka(H5DatasetMapBase):
    name = "InternM1Franka"
    half_in_stage0 = True
    config = DataConfig(
        cameras=("base_view", "base_view_2", "ego_view"),
        wrist_cameras=("ego_view",),
        ee_ref_cams=(("base_view", "base_view_2", "ego_view"),),
        sample_state_gaps=4,
    )


class InternA1Franka(H5DatasetMapBase):
    name = "InternA1Franka"
    half_in_stage0 = True
    config = DataConfig(
        cameras=("head_cam", "hand_cam"),
        wrist_cameras=("hand_cam",),
        ee_ref_cams=(("head_cam", "hand_cam"),),
        record_dt=1 / 10,
        sample_dt=1 / 10,
        sample_state_gaps=2,
    )


class InternA1Lift2(H5DatasetMapBase):
    name = "InternA1Lift2"
    half_in_stage0 = True
    config = _INTERNA1_TWO_ARMS


class InternA1Genie1(H5DatasetMapBase):
    name = "InternA1Genie1"
    half_in_stage0 = True
    config = _INTERNA1_TWO_ARMS


class InternA1SplitAloha(H5DatasetMapBase):
    name = "InternA1SplitAloha"
    half_in_stage0 = True
    config = _INTERNA1_TWO_ARMS


class PickPlaceCan(H5DatasetMapBase):
    """The simulator of examples/pickplace: a fixed camera (eye to hand) and one on the wrist (eye in hand)."""

    name = "PickPlaceCan"
    config = DataConfig(
        cameras=("e2h_cam", "eih_cam"),
        wrist_cameras=("eih_cam",),
        ee_ref_cams=(("e2h_cam", "eih_cam"),),
        sample_dt=1.0,  # the unit of time is one environment step
    )


class Blocks(H5DatasetMapBase):
    """The world of examples/blocks: small images of a fixed camera and of one on the wrist."""

    name = "Blocks"
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(128, 128))


class AlohaPickPlace(H5DatasetMapBase):
    name = "AlohaPickPlace"
    config = _ALOHA


class AlohaTableStorage(H5DatasetMapBase):
    name = "AlohaTableStorage"
    config = _ALOHA


class AlohaPickPlaceClutter(H5DatasetMapBase):
    name = "AlohaPickPlaceClutter"
    config = _ALOHA


DATASETS: dict[str, type[H5DatasetMapBase]] = {
    dataset.name: dataset
    for dataset in (
        LiberoSpatial,
        LiberoObject,
        LiberoGoal,
        Libero10,
        Droid,
        AgibotWorldAlpha,
        InternM1Franka,
        InternA1Franka,
        InternA1Lift2,
        InternA1Genie1,
        InternA1SplitAloha,
        PickPlaceCan,
        Blocks,
        AlohaPickPlace,
        AlohaTableStorage,
        AlohaPickPlaceClutter,
    )
}


def get_dataset_class(name: str) -> type[H5DatasetMapBase]:
    """The dataset class called ``name``.

    Raises:
        ValueError: no such class; lists the known names.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset class {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]
