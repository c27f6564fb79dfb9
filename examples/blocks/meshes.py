"""The simulator's bodies as coloured meshes, for a page that shows them."""

from __future__ import annotations

from collections.abc import Iterable

import mujoco
import numpy as np
import trimesh

VISUAL_GROUP = 1  # robosuite's group of what is seen; what collides is in group 0
_Geom = mujoco.mjtGeom


def body_mesh(model: mujoco.MjModel, geoms: Iterable[int]) -> trimesh.Trimesh:
    """Geometries of one body as a mesh in the body's frame, in metres; of their materials' mean colours.

    Raises:
        ValueError: a geometry without an extent, as a plane.
    """
    parts = []
    for geom in geoms:
        part = _shape(model, geom)
        rotation = np.zeros(9)
        mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
        body_from_geom = np.eye(4)
        body_from_geom[:3, :3], body_from_geom[:3, 3] = rotation.reshape(3, 3), model.geom_pos[geom]
        part.apply_transform(body_from_geom)
        part.visual = trimesh.visual.ColorVisuals(part, face_colors=np.tile(_color(model, geom), (len(part.faces), 1)))
        parts.append(part)
    return trimesh.util.concatenate(parts)


def visible_geoms(model: mujoco.MjModel) -> dict[int, list[int]]:
    """Geometries that are seen and have an extent, by body."""
    bodies: dict[int, list[int]] = {}
    for geom in range(model.ngeom):
        if model.geom_group[geom] == VISUAL_GROUP and model.geom_type[geom] != _Geom.mjGEOM_PLANE:
            bodies.setdefault(int(model.geom_bodyid[geom]), []).append(geom)
    return bodies


def _shape(model: mujoco.MjModel, geom: int) -> trimesh.Trimesh:
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == _Geom.mjGEOM_BOX:
        return trimesh.creation.box(2 * size)
    if kind == _Geom.mjGEOM_CYLINDER:
        return trimesh.creation.cylinder(size[0], 2 * size[1], sections=24)
    if kind == _Geom.mjGEOM_CAPSULE:
        return trimesh.creation.capsule(2 * size[1], size[0])
    if kind == _Geom.mjGEOM_SPHERE:
        return trimesh.creation.icosphere(2, size[0])
    if kind == _Geom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        vertex, face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        return trimesh.Trimesh(
            model.mesh_vert[vertex : vertex + model.mesh_vertnum[mesh]].copy(),
            model.mesh_face[face : face + model.mesh_facenum[mesh]].copy(),
            process=False,
        )
    raise ValueError(f"geometry {geom} ({model.geom(geom).name}) is of type {kind}, of which there is no mesh")


def _color(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """(4,) uint8"""
    material = model.geom_matid[geom]
    rgba = np.array(model.geom_rgba[geom] if material < 0 else model.mat_rgba[material], dtype=float)
    texture = -1 if material < 0 else model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
    if texture >= 0:
        start, channels = model.tex_adr[texture], model.tex_nchannel[texture]
        pixels = model.tex_height[texture] * model.tex_width[texture] * channels
        rgba[:3] *= model.tex_data[start : start + pixels].reshape(-1, channels)[:, :3].mean(0) / 255
    return np.clip(255 * rgba, 0, 255).astype(np.uint8)
