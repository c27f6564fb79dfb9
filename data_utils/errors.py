"""What can be wrong with data: the rules, a fault of a file, an episode left out, and the one exception type."""

from __future__ import annotations

from typing import NamedTuple

RULES = {
    "location": "a dataset has a place on this machine that holds episode files",
    "file": "the file can be opened and read as HDF5",
    "version": "the schema version is one this library knows",
    "schema": "every key is there with its shape and type, and lengths agree",
    "checksum": "what is read is what was written (files of schema version 2)",
    "prompt": "at least one non-empty instruction",
    "arms": "ee_indices name end-effectors that the file has",
    "pose": "poses are finite",
    "rotation": "poses are rigid transforms: their rotation part is a rotation",
    "gripper": "openness lies in [0, 1]",
    "time": "timestamps are finite and do not go backwards",
    "camera": "every camera of the dataset is in the file",
    "intrinsics": "K is a pinhole camera's matrix, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of its images",
    "image": "every frame decodes, all of a camera have one size",
    "video": "the video is there, decodes, and covers the timestamps",
    "mask": "a mask has the size of its image",
    "subtask": "sub-tasks have a text and a first frame each",
}


class Fault(NamedTuple):
    """What is wrong with a file, or unusual in it.

    Args:
        rule: one of :data:`RULES`.
        message: one line that names key and frame; the file is known to whoever asked.
    """

    rule: str
    message: str


class UnusableEpisode(NamedTuple):
    """An episode that is left out, or in whose place another one was drawn.

    Args:
        rule: one of :data:`RULES`.
        message: one line that names the file.
        blocked: it ended or hung the process that read it, and is not opened again.
    """

    path: str
    rule: str
    message: str
    blocked: bool = False


class DataError(ValueError):
    """A file, key or location that cannot be used; the message is one line that names it and says what to do.

    Args:
        message: the line.
        rule: which of :data:`RULES` is broken.
    """

    def __init__(self, message: str, rule: str = "schema") -> None:
        if rule not in RULES:
            raise AssertionError(f"{rule!r} is not a rule of data_utils.errors.RULES")
        super().__init__(message)
        self.rule = rule

    def __reduce__(self):  # the rule survives the way from a worker process
        return DataError, (str(self), self.rule)
