"""An episode in space (end-effector paths, camera frusta, world axes, in metres) and over time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

from data_utils.files import atomic_write
from data_utils.h5io import Episode

AXIS_COLORS = ("#d62728", "#2ca02c", "#1f77b4")  # x, y, z
CAMERA_COLORS = ("#8e44ad", "#d35400", "#16a085", "#7f8c8d", "#c0392b", "#2c3e50")
OPENNESS = LinearSegmentedColormap.from_list("openness", ["#c2185b", "#f2b134", "#1b9e4b"])  # closed to open
ARM_STYLES = ("-", "--", "-.", ":")
SHADOW = "#b9bdc6"
MARKED_POSES = 8  # whose axes are drawn


@dataclass(frozen=True)
class _Box:
    """What the picture shows of space."""

    low: np.ndarray  # (3,) metres
    high: np.ndarray  # (3,)

    @property
    def size(self) -> float:
        return float((self.high - self.low).max())

    @property
    def floor(self) -> float:
        return float(self.low[2])

    def holds(self, point: np.ndarray) -> bool:
        return bool(((self.low <= point) & (point <= self.high)).all())


def save_view(path: Path, episode: Episode) -> None:
    """Write the picture (PNG) of an open episode; it appears when it is whole."""
    figure = Figure(figsize=(14, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1))
    space = figure.add_subplot(grid[:, 0], projection="3d")
    _draw_space(space, episode)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), OPENNESS), ax=space, shrink=0.45, pad=0.02, location="left")
    bar.set_ticks([0, 1], labels=["closed", "open"])
    bar.set_label("gripper")
    positions = figure.add_subplot(grid[0, 1])
    _plot_positions(positions, episode)
    _plot_openness(figure.add_subplot(grid[1, 1], sharex=positions), episode)
    figure.suptitle(f"{episode.path.name}: “{episode.prompts[0]}”", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


# -- over time ------------------------------------------------------------------------------------------------------


def _plot_positions(axes: Axes, episode: Episode) -> None:
    arms = episode.arms
    times = episode.timestamps - episode.timestamps[0]
    for arm, style in zip(arms, ARM_STYLES * len(arms), strict=False):
        for axis, color in enumerate(AXIS_COLORS):
            name = "xyz"[axis] if len(arms) == 1 else f"{'xyz'[axis]} of {arm}"
            axes.plot(times, episode.world_from_ee[:, arm, axis, 3], style, color=color, linewidth=1.6, label=name)
    axes.set_ylabel("end-effector in the world [m]")
    _finish(axes)


def _plot_openness(axes: Axes, episode: Episode) -> None:
    arms = episode.arms
    times = episode.timestamps - episode.timestamps[0]
    for arm, color in zip(arms, ("#333333", "#e67e22", "#2980b9", "#8e44ad") * len(arms), strict=False):
        name = "gripper" if len(arms) == 1 else f"gripper {arm}"
        axes.plot(times, episode.gripper[:, arm], color=color, linewidth=1.8, label=name)
        if episode.gripper_desired is not None:
            desired = episode.gripper_desired[:, arm]
            axes.plot(times, desired, ":", color=color, linewidth=1.6, label=f"{name}, commanded")
    for start, text in episode.subtasks:
        axes.axvline(times[start], color="#999999", linewidth=1)
        axes.text(times[start], 0.5, f" {text}", fontsize=8, rotation=90, va="center", color="#555555")
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([0, 0.5, 1], labels=["closed", "0.5", "open"])
    axes.set_xlabel("time [s]")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(color="#e4e6ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="best", framealpha=0.7)


# -- in space -------------------------------------------------------------------------------------------------------


def _draw_space(axes: Axes3D, episode: Episode) -> None:
    box = _box(episode)
    axes.set_xlim(box.low[0], box.high[0]), axes.set_ylim(box.low[1], box.high[1])
    axes.set_zlim(box.low[2], box.high[2])
    axes.set_box_aspect(box.high - box.low, zoom=1.05)  # a metre is as long on every axis
    _draw_world(axes, box)
    for arm in episode.arms:
        _draw_arm(axes, episode.world_from_ee[:, arm], episode.gripper[:, arm], box)
    for number, camera in enumerate(episode.cameras):
        _draw_camera(axes, episode, camera, CAMERA_COLORS[number % len(CAMERA_COLORS)], box)
    axes.set_xlabel("x [m]"), axes.set_ylabel("y [m]"), axes.set_zlabel("z [m]")
    axes.tick_params(labelsize=8)
    axes.view_init(24, -58)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_facecolor((0.97, 0.97, 0.98, 1.0))
        axis.pane.set_edgecolor("#cccccc")


def _box(episode: Episode) -> _Box:
    """Around all end-effector positions and camera origins, and no thinner than a third of its longest side."""
    origins = [episode.world_from_cam(camera, frame)[:3, 3] for camera in episode.cameras
               for frame in (0, len(episode) - 1)]  # fmt: skip
    points = [episode.world_from_ee[:, list(episode.arms), :3, 3].reshape(-1, 3), np.reshape(origins, (-1, 3))]
    points = np.concatenate(points)
    low, high = points.min(0), points.max(0)
    size = max(float((high - low).max()), 0.1)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, size / 6) + 0.1 * size
    box = _Box(middle - half, middle + half)
    # The world's origin, where it is near.
    near = _Box(box.low - 0.25 * size, box.high + 0.25 * size)
    if near.holds(np.zeros(3)):
        return _Box(np.minimum(box.low, -0.05 * size), np.maximum(box.high, 0.05 * size))
    return box


def _draw_world(axes: Axes3D, box: _Box) -> None:
    origin, name = np.eye(4), "world"
    if not box.holds(np.zeros(3)):
        origin[:3, 3], name = box.low + 0.02 * box.size, "axes of the world"
    length = 0.12 * box.size
    _draw_axes(axes, origin, length, 2.5)
    for axis, color in enumerate(AXIS_COLORS):
        axes.text(*(origin[:3, 3] + 1.2 * length * np.eye(3)[axis]), "xyz"[axis], color=color, ha="center", va="center")
    axes.text(*(origin[:3, 3] - (0, 0, 0.05 * box.size)), name, fontsize=9, ha="center", va="top", color="#333333")


def _draw_arm(axes: Axes3D, world_from_ee: np.ndarray, openness: np.ndarray, box: _Box) -> None:
    """A path (T, 4, 4) coloured by openness (T,), with axes at some poses, and its shadow on the floor."""
    positions = world_from_ee[:, :3, 3]
    axes.plot(positions[:, 0], positions[:, 1], box.floor, color=SHADOW, linewidth=1.5)
    segments = np.stack([positions[:-1], positions[1:]], axis=1)  # (T - 1, 2, 3)
    axes.add_collection3d(Line3DCollection(segments, colors=OPENNESS(openness[:-1].clip(0, 1)), linewidths=3))
    for frame in np.unique(np.linspace(0, len(positions) - 1, MARKED_POSES).astype(int)):
        _draw_axes(axes, world_from_ee[frame], 0.07 * box.size, 1.4)
    for frame, name, side in ((0, "start ", "right"), (-1, " end", "left")):
        axes.scatter(*positions[frame], s=36, color="white", edgecolor="black", depthshade=False, zorder=5)
        axes.text(*positions[frame], name, fontsize=9, ha=side, va="bottom", zorder=6)


def _draw_camera(axes: Axes3D, episode: Episode, camera: str, color: str, box: _Box) -> None:
    """The frustum at the first frame, a mark on its upper edge, and the way of a camera that moves."""
    origins = np.stack([episode.world_from_cam(camera, frame)[:3, 3] for frame in range(len(episode))])
    moves = np.ptp(origins, axis=0).max() > 1e-6
    depth = (0.08 if moves else 0.14) * box.size
    world_from_cam = episode.world_from_cam(camera, 0)
    origin = world_from_cam[:3, 3]
    if moves:
        axes.plot(*origins.T, color=color, linewidth=1, linestyle=":")
    else:
        axes.plot(*np.stack([origin, (*origin[:2], box.floor)]).T, color=SHADOW, linewidth=1, linestyle="--")
    height, width = episode.rgb(camera, 0).shape[:2]
    # Corners of the image, from the upper left one clockwise, and the tip of the mark.
    pixels = np.array([(0, 0), (width, 0), (width, height), (0, height), (width / 2, -0.25 * height)])
    rays = np.linalg.solve(episode.K(camera, 0), np.c_[pixels, np.ones(5)].T).T  # (5, 3) with z = 1
    rays *= depth / max(1.0, np.abs(rays[:4]).max())
    corners = rays @ world_from_cam[:3, :3].T + origin
    sides = [[origin, corners[i], corners[(i + 1) % 4]] for i in range(4)]
    axes.add_collection3d(Poly3DCollection(sides, facecolor=color, edgecolor=color, alpha=0.12, linewidths=1))
    axes.add_collection3d(Line3DCollection([np.stack([*corners[:4], corners[0]])], colors=color, linewidths=1.5))
    axes.add_collection3d(Poly3DCollection([corners[[0, 1, 4]]], facecolor=color, edgecolor=color, alpha=0.6))
    name = origin - 0.03 * box.size * world_from_cam[:3, 2]
    axes.text(*name, camera, color=color, fontsize=10, weight="bold", ha="center", va="bottom", zorder=7)


def _draw_axes(axes: Axes3D, pose: np.ndarray, length: float, width: float) -> None:
    """The axes of a pose (4, 4)."""
    for axis, color in enumerate(AXIS_COLORS):
        end = pose[:3, 3] + length * pose[:3, axis]
        axes.plot(*np.stack([pose[:3, 3], end]).T, color=color, linewidth=width, solid_capstyle="round")
