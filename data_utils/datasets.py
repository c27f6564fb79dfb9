"""The datasets this project knows, with the numbers of each robot and recording."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import importlib
from pathlib import Path

from data_utils.config import DataConfig
from data_utils.data_loc import entry_locations
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.yaml_file import Wrong, build, read_yaml

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


class LiberoSmall(H5DatasetMapBase):
    """Any of LIBERO's suites as a small VLM sees it (examples/libero/train.py): small images in one order, and actions
    in the axes of the camera that it points best in."""

    name = "LiberoSmall"
    config = dataclasses.replace(
        _LIBERO, image_hw=(128, 128), num_future=16, shuffle_cameras=False, ee_ref_cams=(("agentview",),)
    )


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
    config = dataclasses.replace(
        PickPlaceCan.config,
        image_hw=(128, 128),
        num_future=16,
        # As its small VLM has learned to see them: the fixed camera first, and what it points to is told in its axes.
        shuffle_cameras=False,
        ee_ref_cams=(("e2h_cam",),),
    )


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
        LiberoSmall,
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
    """The dataset class that ``name`` stands for.

    Args:
        name: one of :data:`DATASETS`; ``package.module:Class``; or the path of a YAML file, whose keys are fields of
            :class:`DataConfig` and ``name`` (default: the file's own) and ``episodes`` (a folder, file or glob, or a
            list of these, from the file's folder; default: that folder).
    Raises:
        ValueError: no such class or file, or what is wrong with it; in one line.
    """
    if name in DATASETS:
        return DATASETS[name]
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"there is no dataset file {path}")
        return _of_file(path, path.stat().st_mtime_ns)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown dataset class {name!r}; known: {', '.join(DATASETS)}; or package.module:Class, or a YAML file"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"dataset class {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, H5DatasetMapBase) and hasattr(found, "config")):
        raise ValueError(f"dataset class {name}: is no class with a config that is derived from H5DatasetMapBase")
    return found


def dataset_class_or_plain(name: str) -> type[H5DatasetMapBase]:
    """The class of that name, or, where it is not installed, one without rules or places of its own: enough for whoever
    has a configuration and files."""
    try:
        return get_dataset_class(name)
    except ValueError:
        return H5DatasetMapBase


class _OfFile(type):
    """Of classes that a file describes. They have no module to be found in, as pickle would: see below."""


copyreg.pickle(_OfFile, lambda cls: (get_dataset_class, (cls.source,)))  # for workers


@functools.lru_cache(maxsize=32)
def _of_file(path: Path, modified_ns: int) -> type[H5DatasetMapBase]:
    """``modified_ns``: read anew where the file was written anew."""
    file = read_yaml(path)
    values = dict(file.value) if isinstance(file.value, dict) else file.value
    own = {key: values.pop(key, default) for key, default in (("name", path.stem), ("episodes", "."))} if values else {}
    try:
        config = build(DataConfig, values)
    except Wrong as error:
        raise ValueError(f"{file.at(error.place)}: {error}") from error
    if not isinstance(own["name"], str) or not own["name"]:
        raise ValueError(f"{file.at('name')}: name is {own['name']!r}; wanted a text")
    entry = own["name"], own["episodes"], file.at("episodes"), path.parent
    return _OfFile(own["name"], (H5DatasetMapBase,), {
        "__doc__": f"As {path} describes it.",
        "name": own["name"],
        "config": config,
        "source": str(path),
        "locations": classmethod(lambda cls: entry_locations(*entry)),
    })  # fmt: skip
