"""Renewing the checksums of an episode file that was changed on purpose."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from data_utils.checks.checker import Report
from data_utils.episodes import schema
from data_utils.episodes.file import is_text
from data_utils.errors import DataError
from data_utils.h5io import seal
from data_utils.words import one_line

SHOWN_FRAMES = 5  # of a camera whose frames have changed


def reseal(path: str, report: Report, check: Callable[[str], Report], named: bool) -> list[str]:
    """Renew the checksums of a file; one that breaks another rule is left alone.

    The file is copied beside itself, the copy sealed, checked, and put in its place.

    Args:
        path: the file.
        report: what a check of it said.
        check: checks the copy, whose faults the wrong checksums may have hidden.
        named: the file was named by itself; only then may its images have changed, since a damaged JPEG often still
            decodes and nothing but its checksum tells.
    Returns:
        What had changed, in words; nothing where the checksums agreed already.
    Raises:
        DataError: the file has other faults, or no checksums, or other images without being ``named``.
    """
    refused = next((item for item in report.faults if item.rule != "checksum"), None)
    if refused is not None:
        raise DataError(f"{refused.message}; nothing is resealed before this is put right", refused.rule)
    with h5py.File(path, "r") as file:
        version = int(file.attrs.get(schema.VERSION_ATTR, 0))
    if version < 2:
        raise DataError(f"files of schema version {version} have no checksums; there is nothing to renew", "version")
    if not report.faults:
        return []
    try:
        changed, images = _changes(path)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        what = f"cannot be read ({one_line(error)}); the file is damaged"
        raise DataError(f"the file {what}; nothing is resealed before this is put right", "file") from error
    if images and not named:
        what = f"{', '.join(images)} differ from their checksums, as damage makes them do too; look at them, and where"
        how = f"they were changed on purpose, name this file alone: python -m data_utils.inspect {path} --reseal"
        raise DataError(f"{what} {how}", "checksum")
    original = Path(path)
    copy = original.with_name(f".{original.name}.{os.getpid()}.tmp")
    try:
        shutil.copy(original, copy)
        with h5py.File(copy, "r+") as file:
            seal(file)
        hidden = check(str(copy)).faults
        if hidden:
            raise DataError(f"{hidden[0].message}; nothing is resealed before this is put right", hidden[0].rule)
        with open(copy, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(copy, original)
    finally:
        copy.unlink(missing_ok=True)
    return changed


def _changes(path: str) -> tuple[list[str], list[str]]:
    """Keys whose checksums differ, in words, and those among them that are images."""
    changed, images = [], []
    with h5py.File(path, "r") as file:
        attributes = dict(file.attrs)
        if int(attributes.get(schema.ATTRIBUTES_CHECKSUM_ATTR, -1)) != schema.attributes_checksum(attributes):
            changed.append("attributes")
        listed = schema.parse_checksums(attributes[schema.CHECKSUMS_ATTR])
        for key, checksum in listed.items():
            beside = schema.FRAME_CHECKSUMS.format(key=key)
            if key not in file:
                what = f"{key} (gone)"
            elif checksum is None and beside in file:
                found, wanted = schema.frame_checksums(file[key]), file[beside][()]
                if found.shape == wanted.shape:
                    frames = np.flatnonzero(found != wanted).tolist()
                    if not frames:
                        continue
                    shown = ", ".join(map(str, frames[:SHOWN_FRAMES])) + (" ..." if frames[SHOWN_FRAMES:] else "")
                    what = f"{key} (frame {shown})" if len(frames) == 1 else f"{key} ({len(frames)} frames: {shown})"
                else:
                    what = f"{key} (number of frames)"
            elif checksum is None:
                what = key
            else:
                array = file[key]
                if checksum == schema.array_checksum((array.asstr() if is_text(array.dtype) else array)[()]):
                    continue
                what = key
            changed.append(what)
            if checksum is None and key.endswith("/rgb"):
                images.append(what)
    return changed, images
