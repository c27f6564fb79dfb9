"""Draws assets/camera_conventions.png: world, camera, end-effector and image axes of one made-up scene.

    python docs/draw_conventions.py

The image on the right is computed from the poses on the left, by the functions that draw trajectories.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_utils.geometry.camera import project

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "camera_conventions.png"
X, Y, Z = "#d62728", "#2ca02c", "#1f77b4"
CAMERA, GRIPPER, TABLE, GREY = "#7d3c98", "#34495e", "#e9dcc5", "#5f6670"
FUTURE = "#28b43c"
WIDTH, HEIGHT = 640, 480
K = np.array([[620.0, 0.0, 320.0], [0.0, 620.0, 240.0], [0.0, 0.0, 1.0]])
TABLE_CORNERS = np.array([[-0.12, -0.14, 0.0], [1.0, -0.14, 0.0], [1.0, 0.66, 0.0], [-0.12, 0.66, 0.0]])
IMAGE_PLANE = 0.4  # metres in front of the camera, where its image is drawn


def look_at(origin: np.ndarray, target: np.ndarray) -> np.ndarray:
    """world_from_cam (4, 4), OpenCV axes, of a camera held upright."""
    z = (target - origin) / np.linalg.norm(target - origin)
    x = np.cross(z, (0.0, 0.0, 1.0))
    x /= np.linalg.norm(x)
    pose = np.eye(4)
    pose[:3] = np.c_[x, np.cross(z, x), z, origin]
    return pose


def gripper_pose() -> np.ndarray:
    """world_from_ee (4, 4): fingers down, turned a little."""
    angle = np.deg2rad(20)
    pose = np.eye(4)
    pose[:3, 0] = (np.cos(angle), np.sin(angle), 0.0)
    pose[:3, 2] = (0.0, 0.0, -1.0)
    pose[:3, 1] = np.cross(pose[:3, 2], pose[:3, 0])
    pose[:3, 3] = (0.66, 0.3, 0.22)
    return pose


def gripper_lines(world_from_ee: np.ndarray) -> list[np.ndarray]:
    """Polylines (n, 3) in the world: palm, two fingers, wrist. The origin lies between the fingertips."""
    lines = [
        np.array([(0, -0.07, 0.0), (0, -0.07, -0.1), (0, 0.07, -0.1), (0, 0.07, 0.0)]),
        np.array([(0, 0, -0.1), (0, 0, -0.2)]),
    ]
    return [line @ world_from_ee[:3, :3].T + world_from_ee[:3, 3] for line in lines]


def path_positions(world_from_ee: np.ndarray) -> np.ndarray:
    """(24, 3) where the end-effector goes next: up and over to the right, then down."""
    s = np.linspace(0, 1, 24)[:, None]
    start, end = world_from_ee[:3, 3], np.array([0.85, -0.02, 0.04])
    return start + s * (end - start) + np.sin(np.pi * s) * (0, 0, 0.14)


# -- the scene ------------------------------------------------------------------------------------------------------


def draw_frame(axes: Axes3D, pose: np.ndarray, length: float, names: Sequence[str], places=("cc", "cc", "cc")) -> None:
    """Arrows along the axes of a pose; ``places`` aligns each name with its arrow's tip."""
    horizontal, vertical = {"l": "left", "c": "center"}, {"t": "top", "c": "center", "b": "bottom"}
    for axis, (color, name, (h, v)) in enumerate(zip((X, Y, Z), names, places, strict=True)):
        origin, way = pose[:3, 3], length * pose[:3, axis]
        axes.quiver(*origin, *way, color=color, linewidth=2.6, arrow_length_ratio=0.16, zorder=8)
        tip = origin + (1.18 if h == "c" else 1.04) * way
        axes.text(*tip, name, color=color, fontsize=11, weight="bold", ha=horizontal[h], va=vertical[v], zorder=11)


def draw_link(axes: Axes3D, end: np.ndarray, name: str, color: str, at: float, shift: tuple[float, ...]) -> None:
    """The way from the world's origin to a frame's, with the pose's name beside it."""
    axes.plot(*np.stack([np.zeros(3), end]).T, color=color, linewidth=1.6, linestyle=(0, (5, 3)))
    axes.text(*(at * end + shift), name, color=color, fontsize=12, family="monospace", ha="center", va="center",
              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}, zorder=9)  # fmt: skip


def draw_scene(axes: Axes3D, world_from_cam: np.ndarray, world_from_ee: np.ndarray) -> None:
    axes.add_collection3d(Poly3DCollection([TABLE_CORNERS], facecolor=TABLE, edgecolor="#c9b48c", alpha=0.7))
    draw_frame(axes, np.eye(4), 0.22, ("x", "y", "z"))
    axes.text(-0.02, -0.02, -0.07, "world", fontsize=13, weight="bold", ha="center", va="top")

    origin = world_from_cam[:3, 3]
    pixels = np.array([(0, 0), (WIDTH, 0), (WIDTH, HEIGHT), (0, HEIGHT)])
    rays = IMAGE_PLANE * np.c_[pixels, np.ones(4)] @ np.linalg.inv(K).T  # (4, 3)
    corners = rays @ world_from_cam[:3, :3].T + origin
    sides = [[origin, corners[i], corners[(i + 1) % 4]] for i in range(4)]
    axes.add_collection3d(Poly3DCollection(sides, facecolor=CAMERA, edgecolor=CAMERA, alpha=0.08, linewidths=0.8))
    axes.add_collection3d(
        Poly3DCollection([corners], facecolor="#ffffff", edgecolor=CAMERA, alpha=0.55, linewidths=1.8)
    )
    axes.scatter(*corners[0], s=30, color=CAMERA, depthshade=False)
    axes.text(*(corners[0] + (0, 0, 0.035)), "pixel (0, 0)", fontsize=10, color=CAMERA, ha="center", va="bottom")
    draw_frame(axes, world_from_cam, 0.28, (" x right", "y down", " z forward"), ("lt", "cc", "lt"))
    axes.text(*(origin + (-0.05, -0.03, 0.05)), "camera", fontsize=13, weight="bold", color=CAMERA, ha="right")

    for line in gripper_lines(world_from_ee):
        axes.plot(*line.T, color=GRIPPER, linewidth=5, solid_capstyle="round", alpha=0.75)
    draw_frame(axes, world_from_ee, 0.17, ("x", "y", "z"))
    axes.text(*(world_from_ee[:3, 3] + (0.0, 0.0, 0.25)), "end-effector", fontsize=13, weight="bold", color=GRIPPER,
              ha="center")  # fmt: skip

    axes.plot(*path_positions(world_from_ee).T, color=FUTURE, linewidth=1.5, marker="o", markersize=2.6, markevery=2)

    # The ray through the pixel of the end-effector.
    axes.plot(*np.stack([origin, world_from_ee[:3, 3]]).T, color=GREY, linewidth=1, linestyle=":")
    on_plane = origin + (world_from_ee[:3, 3] - origin) * IMAGE_PLANE / depth(world_from_ee[:3, 3], world_from_cam)
    axes.scatter(*on_plane, s=26, color="black", depthshade=False, zorder=10)
    draw_link(axes, origin, "world_from_cam", CAMERA, 0.42, (0.0, 0.0, 0.0))
    draw_link(axes, world_from_ee[:3, 3], "world_from_ee", GRIPPER, 0.5, (0.02, -0.02, 0.0))

    axes.set_xlim(-0.5, 1.1), axes.set_ylim(-0.2, 0.8), axes.set_zlim(0, 0.8)
    axes.set_box_aspect((1.6, 1.0, 0.8), zoom=1.12)
    axes.view_init(27, -124)
    axes.set_axis_off()


def depth(point: np.ndarray, world_from_cam: np.ndarray) -> float:
    return float((point - world_from_cam[:3, 3]) @ world_from_cam[:3, 2])


# -- its image ------------------------------------------------------------------------------------------------------


def draw_image(axes: Axes, world_from_cam: np.ndarray, world_from_ee: np.ndarray) -> None:
    def pixels(points: np.ndarray) -> np.ndarray:
        return project(points, K, world_from_cam)[0]

    axes.add_patch(Rectangle((0, 0), WIDTH, HEIGHT, facecolor="#f7f7f9", edgecolor=CAMERA, linewidth=2.5))
    clip = Rectangle((0, 0), WIDTH, HEIGHT, transform=axes.transData)
    (table,) = axes.fill(*pixels(TABLE_CORNERS).T, facecolor=TABLE, edgecolor="#c9b48c", alpha=0.7)
    table.set_clip_path(clip)
    for line in gripper_lines(world_from_ee):
        axes.plot(*pixels(line).T, color=GRIPPER, linewidth=6, solid_capstyle="round", alpha=0.75)
    path = pixels(path_positions(world_from_ee))
    axes.plot(*path.T, color=FUTURE, linewidth=2, marker="o", markersize=3.2, markevery=2, zorder=4)
    thin = {"arrowstyle": "-", "color": FUTURE, "linewidth": 0.8}
    text = "the future, drawn with\nthe same formula"
    axes.annotate(text, path[18], (400, 60), fontsize=10, color="#1c8a2c", va="center", arrowprops=thin)

    ends = world_from_ee[:3, 3] + 0.17 * world_from_ee[:3, :3].T  # tips of x, y, z
    (u, v), tips = pixels(world_from_ee[:3, 3]), pixels(ends)
    for tip, color in zip(tips, (X, Y, Z), strict=True):
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 2.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tip, (u, v), arrowprops=arrow)
    axes.plot([u, u], [0, v], color=GREY, linewidth=1, linestyle=":")
    axes.plot([0, u], [v, v], color=GREY, linewidth=1, linestyle=":")
    axes.plot(u, v, "o", color="black", markersize=6, zorder=6)
    axes.text(u - 14, v + 30, f"(u, v) = ({u:.0f}, {v:.0f})", fontsize=11, weight="bold", ha="right")

    cx, cy = K[0, 2], K[1, 2]
    axes.plot(cx, cy, "+", color=CAMERA, markersize=13, markeredgewidth=2)
    axes.text(cx + 10, cy + 22, "(cx, cy)", fontsize=10, color=CAMERA)
    long_arrow = {"arrowstyle": "-|>", "linewidth": 2.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (190, -26), (0, -26), arrowprops={**long_arrow, "color": X}, annotation_clip=False)
    axes.annotate("", (-26, 190), (-26, 0), arrowprops={**long_arrow, "color": Y}, annotation_clip=False)
    axes.text(200, -26, "u (x right)", color=X, fontsize=11, weight="bold", va="center")
    axes.text(-26, 200, "v (y down)", color=Y, fontsize=11, weight="bold", rotation=-90, ha="center", va="top")
    axes.text(-30, -34, "(0, 0)", color=CAMERA, fontsize=10, ha="center", va="bottom")
    axes.text(WIDTH, HEIGHT + 10, f"{WIDTH} x {HEIGHT} pixels", fontsize=10, color=CAMERA, ha="right", va="top")
    axes.set_xlim(-70, WIDTH + 12), axes.set_ylim(HEIGHT + 40, -70)  # v grows downwards
    axes.set_aspect("equal")
    axes.set_axis_off()


def main() -> None:
    world_from_cam = look_at(np.array([-0.46, 0.14, 0.66]), np.array([0.62, 0.22, 0.12]))
    world_from_ee = gripper_pose()
    figure = Figure(figsize=(13.6, 6.2), facecolor="white")
    FigureCanvasAgg(figure)
    scene = figure.add_axes((0.0, -0.01, 0.53, 1.16), projection="3d", computed_zorder=False)
    draw_scene(scene, world_from_cam, world_from_ee)
    draw_image(figure.add_axes((0.54, 0.2, 0.45, 0.74)), world_from_cam, world_from_ee)
    figure.text(0.265, 0.95, "In space", fontsize=15, ha="center", weight="bold")
    figure.text(0.78, 0.95, "In the camera's image", fontsize=15, ha="center", weight="bold")
    figure.text(0.54, 0.14, "point_cam = inv(world_from_cam) @ point_world", fontsize=12, family="monospace")
    figure.text(0.54, 0.09, "(u, v, 1) = K @ point_cam / point_cam.z", fontsize=12, family="monospace")
    figure.text(0.54, 0.04, "K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], at the size of the stored image",
                fontsize=11, color=GREY)  # fmt: skip
    notes = (
        "Red, green, blue are x, y, z. Columns of a pose are these axes and the origin, in the world.\n"
        "End-effector: origin between the fingertips, z the way they point."
    )
    figure.text(0.02, 0.085, notes, fontsize=11, color=GREY, va="center")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
