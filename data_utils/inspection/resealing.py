"""Renewing the checksums of an episode file that was changed on purpose."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py

from data_utils import schema
from data_utils.checker import Report
from data_utils.errors import DataError
from data_utils.h5io import seal


def reseal(path: str, report: Report, check: Callable[[str], Report]) -> bool:
    """Renew the checksums of a file; one that breaks another rule is left alone.

    The file is copied beside itself, the copy sealed, checked, and put in its place.

    Args:
        path: the file.
        report: what a check of it said.
        check: checks the copy, whose faults the wrong checksums may have hidden.
    Returns:
        Whether anything was renewed; False where the checksums agreed already.
    Raises:
        DataError: the file has other faults, or no checksums.
    """
    refused = next((item for item in report.faults if item[0] != "checksum"), None)
    if refused is not None:
        raise DataError(f"{refused[1]}; nothing is resealed before this is put right", refused[0])
    with h5py.File(path, "r") as file:
        version = int(file.attrs.get(schema.VERSION_ATTR, 0))
    if version < 2:
        raise DataError(f"files of schema version {version} have no checksums; there is nothing to renew", "version")
    if not report.faults:
        return False
    original = Path(path)
    copy = original.with_name(f".{original.name}.{os.getpid()}.tmp")
    try:
        shutil.copy(original, copy)
        with h5py.File(copy, "r+") as file:
            seal(file)
        hidden = check(str(copy)).faults
        if hidden:
            raise DataError(f"{hidden[0][1]}; nothing is resealed before this is put right", hidden[0][0])
        with open(copy, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(copy, original)
    finally:
        copy.unlink(missing_ok=True)
    return True
