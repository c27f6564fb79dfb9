"""A chain out of a robot's description, MJCF or URDF, as MuJoCo understands it.

MuJoCo reads both formats and settles what a description leaves open (defaults, includes, Euler angles, the frame of a
site); the chain is taken out of its compiled model once. What is not kinematics is dropped before: meshes need not be
there.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from data_utils.kinematics.chain import Chain, Joint
from data_utils.words import one_line

FILES = (".xml", ".mjcf", ".urdf")
# Parts of a model that no pose depends on; what refers to another comes before it.
_NO_KINEMATICS = (
    "keys", "sensors", "actuators", "equalities", "tendons", "pairs", "excludes", "tuples", "skins", "flexes",
    "cameras", "lights", "geoms", "materials", "textures", "meshes", "hfields",
)  # fmt: skip


def description_path(name: str, folder: Path) -> Path:
    """Where a description is.

    Args:
        name: a file (MJCF or URDF) relative to ``folder``, or the name of a module of the package robot_descriptions,
            such as ``panda_mj_description``, which fetches its repository when it is first asked for.
    Raises:
        DataError: there is no such file, or the package is missing, does not know the name or cannot fetch it.
    """
    if Path(name).suffix.lower() in FILES:
        if not (folder / name).is_file():
            raise DataError(f"description is {name}, which is not beside it; put it there, or name another", "file")
        return folder / name
    if not re.fullmatch(r"\w+", name):
        what = f"wanted a file ({', '.join(FILES)}) or a name of robot_descriptions"
        raise DataError(f"description is {name!r}; {what}", "schema")
    try:
        found = importlib.util.find_spec(f"robot_descriptions.{name}")
    except ImportError as error:
        what = f"description {name} is a name of robot_descriptions; pip install robot_descriptions, or name a file"
        raise DataError(what, "file") from error
    if found is None:
        raise DataError(
            f"description is {name!r}, which robot_descriptions does not know; name a file, or another", "file"
        )
    try:
        module = importlib.import_module(f"robot_descriptions.{name}")
    except Exception as error:  # whatever git and the network have to say
        what = f"description {name} cannot be fetched ({one_line(error)}); it needs git and the network, once"
        raise DataError(what, "file") from error
    return Path(getattr(module, "MJCF_PATH", None) or module.URDF_PATH)


def read_chain(path: Path, joints: Sequence[str], end_effector: str, base: str | None = None) -> Chain:
    """The joints of a description that move its end-effector.

    Args:
        path: MJCF or URDF.
        joints: their names, in the order of positions.
        end_effector: a site, or else a body (a link of a URDF).
        base: body in whose frame poses are given; the description's world where it is None.
    Raises:
        DataError: MuJoCo is missing or cannot read the file, there is no such joint, body or site, a joint that moves
            the end-effector is not named, or one that is named does not move it.
    """
    model = _compiled(path)
    known = [model.joint(number).name for number in range(model.njnt)]
    for name in joints:
        if name not in known:
            raise DataError(f"joint {name!r} is not in {path.name}; it has {', '.join(filter(None, known))}", "schema")
        if list(joints).count(name) > 1:
            raise DataError(f"joint {name!r} is named twice", "schema")
    found, last_from_ee = _between(model, path, base, end_effector)
    there = [joint.name for joint in found]
    for name in there:
        if name not in joints:
            what = f"joint {name or 'without a name'!r} moves {end_effector!r} and is not named"
            raise DataError(f"{what}; those that do are {', '.join(there)}", "schema")
    for name in joints:
        if name not in there:
            what = f"joint {name!r} does not move {end_effector!r}; leave it out, and its numbers"
            raise DataError(f"{what}: {', '.join(there) or 'none'} do", "schema")
    return Chain(found, last_from_ee, joints)


def _compiled(path: Path):
    """The MjModel of a description, without what no pose depends on."""
    try:
        import mujoco
    except ImportError as error:
        raise DataError(f"{path.name}: robots' descriptions need MuJoCo; pip install mujoco", "file") from error
    try:
        description = mujoco.MjSpec.from_file(str(path))
        for kind in _NO_KINEMATICS:
            for part in list(getattr(description, kind)):
                part.delete()
        description.compiler.fusestatic = False  # links without a joint keep their names
        description.compiler.boundmass = description.compiler.boundinertia = 1.0  # and bodies need no mass
        return description.compile()
    except Exception as error:  # its parser raises ValueError, and mujoco.FatalError
        raise DataError(f"{path}: cannot be read as MJCF or URDF ({one_line(error)})", "file") from error


def _between(model, path: Path, base: str | None, end_effector: str) -> tuple[list[Joint], np.ndarray]:
    """The joints from ``base`` outwards, and the last one's frame to the end-effector's."""
    import mujoco

    bodies = [model.body(number).name for number in range(model.nbody)]
    sites = [model.site(number).name for number in range(model.nsite)]
    if base is not None and base not in bodies:
        raise DataError(f"no body {base!r} in {path.name}; it has {', '.join(filter(None, bodies))}", "schema")
    constant = np.eye(4)  # from the frame of the joint before to the one that is reached
    if end_effector in sites:
        site = sites.index(end_effector)
        body, last = int(model.site_bodyid[site]), _transform(model.site_pos[site], model.site_quat[site])
    elif end_effector in bodies:
        body, last = bodies.index(end_effector), np.eye(4)
    else:
        there = f"sites {', '.join(filter(None, sites)) or '(none)'}; bodies {', '.join(filter(None, bodies))}"
        raise DataError(f"no site or body {end_effector!r} in {path.name}; it has {there}", "schema")
    way, stop = [], 0 if base is None else bodies.index(base)
    while body != stop:
        if body == 0:
            raise DataError(
                f"no way from {base!r} out to {end_effector!r} in {path.name}; name a body below it", "schema"
            )
        way.append(body)
        body = int(model.body_parentid[body])
    joints = []
    for body in reversed(way):
        constant = constant @ _transform(model.body_pos[body], model.body_quat[body])
        for number in range(model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]):
            name, kind = model.joint(number).name, model.jnt_type[number]
            if kind not in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                what = "is a ball or free joint; chains of hinges and slides only"
                raise DataError(f"joint {name!r} of {path.name} {what}", "schema")
            body_from_joint = _with_z_along(model.jnt_axis[number], model.jnt_pos[number])
            limits = model.jnt_range[number] if model.jnt_limited[number] else (-np.inf, np.inf)
            slides, rest = kind == mujoco.mjtJoint.mjJNT_SLIDE, model.qpos0[model.jnt_qposadr[number]]
            joints.append(Joint(name, slides, float(limits[0]), float(limits[1]), constant @ body_from_joint))
            # The body lies as it is described where the joint is at its reference, which need not be 0.
            constant = _moved(-rest, slides) @ np.linalg.inv(body_from_joint)
    return joints, constant @ last


def _transform(position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """(4, 4) of a position and a quaternion w, x, y, z, as MuJoCo has them."""
    transform = np.eye(4)
    transform[:3, :3] = Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()
    transform[:3, 3] = position
    return transform


def _with_z_along(axis: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """(4, 4) of a frame at ``anchor`` whose z is the unit vector ``axis``."""
    frame = np.eye(4)
    x = np.cross(np.eye(3)[np.argmin(np.abs(axis))], axis)
    frame[:3, 0] = x / np.linalg.norm(x)
    frame[:3, 1] = np.cross(axis, frame[:3, 0])
    frame[:3, 2], frame[:3, 3] = axis, anchor
    return frame


def _moved(by: float, slides: bool) -> np.ndarray:
    """(4, 4) of a joint that has moved so far about its z, or along it."""
    moved = np.eye(4)
    if slides:
        moved[2, 3] = by
    else:
        moved[:2, :2] = [[np.cos(by), -np.sin(by)], [np.sin(by), np.cos(by)]]
    return moved
