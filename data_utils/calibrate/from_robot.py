"""What the sub-command ``from-robot`` takes and does: pictures to mark, then a camera's pose from the marks."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data_utils.calibrate import gripper
from data_utils.calibrate.results import after_lens, arm_of, axis, cameras_of, position, put, some, today, write_png
from data_utils.calibrate.tables import MARK_COLUMNS, Mark, read_marks
from data_utils.cli import CommandLineError, check_writable
from data_utils.data_loc import find_episodes
from data_utils.errors import DataError
from data_utils.files import write_text
from data_utils.h5io import Episode
from data_utils.rig import Residuals, RigCamera
from data_utils.video import VideoCache
from data_utils.words import counted


@dataclass(frozen=True)
class FromRobotOptions:
    """The pose of a camera that stands, from recorded episodes in which the gripper is pointed at; no board."""

    episodes: tuple[str, ...]
    """Episode files, folders or quoted globs."""
    camera: str
    """Its name in the episodes and in the rig."""
    marks: Path | None = None
    """Where frames show the gripper's point: CSV, YAML or JSON of episode, frame, u, v."""
    frames_to_mark: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write pictures to look for the point in, and DIR/marks.csv to be filled in, and end."""
    count: int = 30
    """Of these pictures."""
    rig: Path = Path("rig.yaml")
    """File that takes the result."""
    arm: int = 0
    """Which end-effector is marked."""
    point: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The marked point, in metres in the end-effector's frame."""
    intrinsics: Literal["rig", "episode", "estimate"] = "rig"
    """Whose K: the rig's, the episodes', or found too (one focal length, no distortion)."""

    def run(self) -> None:
        if (self.marks is None) == (self.frames_to_mark is None):
            raise CommandLineError("wanted --frames-to-mark DIR first, then --marks DIR/marks.csv")
        files: dict[str, Path] = {}
        for pattern in self.episodes:
            for path in map(Path, find_episodes(pattern, "name recorded episodes with --episodes")):
                if files.setdefault(path.name, path) != path:
                    raise DataError(f"{path} and {files[path.name]} have one name; marks would mean both", "location")
        if self.frames_to_mark is not None:
            self._write_frames(files, self.frames_to_mark)
        else:
            self._calibrate(files, self.marks)

    def _write_frames(self, files: dict[str, Path], folder: Path) -> None:
        check_writable(folder, "--frames-to-mark")
        table = folder / "marks.csv"
        if table.exists():
            raise CommandLineError(f"{table} is there already, perhaps filled in; name another --frames-to-mark")
        places, positions = [], []
        for name, path in files.items():
            with _open(path, self.camera) as episode:
                for frame in range(len(episode)):
                    places.append((name, frame))
                    positions.append(arm_of(episode.world_from_ee[frame], self.arm, path)[:3, 3])
        chosen = sorted(places[index] for index in gripper.spread_frames(np.array(positions), self.count))
        for name, frame in chosen:
            with _open(files[name], self.camera) as episode:
                write_png(folder / f"{Path(name).stem}_frame_{frame:06d}.png", episode.rgb(self.camera, frame))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(MARK_COLUMNS)
        writer.writerows((name, frame, "", "") for name, frame in chosen)
        write_text(table, text.getvalue())
        print(
            f"wrote {counted(len(chosen), 'picture')} and {table}: fill in u (to the right) and v (down) in pixels of"
        )
        print("the point; leave both empty where it is hidden. Then the same command with --marks instead")

    def _calibrate(self, files: dict[str, Path], table: Path) -> None:
        check_writable(self.rig.parent, "--rig")
        marks = read_marks(table)
        points, K, size = self._marked(files, marks, table)
        camera = cameras_of(self.rig).get(self.camera)
        fit_K, distortion = self._lens(camera, K, size)
        pixels = np.array([(mark.u, mark.v) for mark in marks]).reshape(-1, 2)
        found = gripper.find_pose(points, pixels, fit_K, distortion, size)
        if self.intrinsics != "rig":
            camera = RigCamera(size, found.K)
        outliers = some(
            [f"{mark} ({px:.3g} px)" for mark, px, u in zip(marks, found.px, found.used, strict=True) if not u]
        )
        method = f"from-robot, from {found.used.sum()} of {counted(len(marks), 'mark')}"
        if self.intrinsics != "rig":
            method += f", K {'estimated too' if self.intrinsics == 'estimate' else 'of the episodes'}"
        method += f", without {outliers}" if outliers else ""
        error = Residuals(*(found.rms(values) for values in (found.px, found.mm, found.deg)))
        if found.focal_sigma is not None:
            print(f"K estimated: focal length {found.K[0, 0]:.1f} +- {found.focal_sigma:.2g} px, centre in the middle")
        print(f"error {error} at the gripper")
        if outliers:
            print(f"left out: {outliers}")
        pose = found.world_from_cam
        print(f"world_from_cam: at {position(pose)}, looks along {axis(pose)}")
        nowhere = {"on_arm": None, "ee_from_cam": None}
        placed = dataclasses.replace(
            camera, **nowhere, world_from_cam=pose, error=error, date=today(), method=after_lens(camera, method)
        )
        put(self.rig, self.camera, placed)

    def _lens(
        self, camera: RigCamera | None, K: np.ndarray, size: tuple[int, int]
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """K (3, 3) and distortion of the episodes' images, whose recorded K is given; None: to be estimated."""
        if self.intrinsics == "estimate":
            return None, np.zeros(0)
        if self.intrinsics == "episode":
            return K, np.zeros(0)
        if camera is None:
            what = f"{self.rig} has no camera {self.camera!r} with intrinsics"
            raise DataError(f"{what}; run intrinsics first, or give --intrinsics episode or estimate", "camera")
        return camera.lens(size[::-1], K)

    def _marked(
        self, files: dict[str, Path], marks: Sequence[Mark], table: Path
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Where the marked points are in the world (N, 3); K (3, 3) and (width, height) of the episodes' images."""
        by_stem = {Path(name).stem: path for name, path in files.items()}
        points, seen = np.zeros((len(marks), 3)), []
        for name in dict.fromkeys(mark.episode for mark in marks):
            path = files.get(name, by_stem.get(name))
            if path is None:
                raise DataError(f"{table} names episode {name}, which is not among --episodes", "location")
            with _open(path, self.camera) as episode:
                mine = [index for index, mark in enumerate(marks) if mark.episode == name]
                for index in mine:
                    frame = marks[index].frame
                    if not 0 <= frame < len(episode):
                        what = f"names frame {frame} of {name}, which has {len(episode)}, counted from 0"
                        raise DataError(f"{table} {what}", "schema")
                    pose = arm_of(episode.world_from_ee[frame], self.arm, path)
                    points[index] = pose[:3, :3] @ self.point + pose[:3, 3]
                first = episode.camera_frame(self.camera, marks[mine[0]].frame)
                seen.append((path, first.K, first.rgb.shape[1::-1]))
        if not seen:
            raise DataError(f"{table} holds no marks; fill in u and v where a picture shows the point", "schema")
        path, K, size = seen[0]
        for other, other_K, other_size in seen[1:]:
            if other_size != size or (self.intrinsics != "estimate" and np.abs(other_K - K).max() > 1e-2):
                what = f"{other} has another image size or K of {self.camera} than {path}"
                raise DataError(f"{what}; calibrate with episodes of one camera setting", "intrinsics")
        return points, K, (int(size[0]), int(size[1]))


@contextlib.contextmanager
def _open(path: Path, camera: str) -> Iterator[Episode]:
    with contextlib.closing(VideoCache("pyav")) as videos, Episode(path, [camera], videos=videos) as episode:
        yield episode
