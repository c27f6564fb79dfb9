"""Policies on the Hugging Face Hub: an exported folder (``apt/hub_folder.py``) is what a repository holds.

Wherever a checkpoint is given, ``org/name`` or ``org/name@revision`` may be given too. What is on this machine comes
first: a file or folder of that name, then a run's.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from data_utils.words import one_line
from train_utils.places import named_checkpoint

CARD_PLACE = "path/of/this/folder"
"""In a card's commands, where the checkpoint's place stands."""
_PART = r"[A-Za-z0-9][\w.\-]*"
_REPOSITORY = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w.\-/]+))?")


class HubError(ValueError):
    """A repository that cannot be read or written; the message says which and what to do."""


def located(name_or_path: str | Path) -> Path:
    """Where a checkpoint lies: a path as it is, the name of a run, or a repository of the Hub, fetched into the Hub's
    cache (once per process: whoever asks again gets the same files).

    A path that does not exist and cannot be a repository comes back as it is.

    Raises:
        HubError: no such repository, one without a policy, or no way to it.
    """
    path = named_checkpoint(name_or_path)
    if path.exists() or not (named := _repository(str(name_or_path))):
        return path
    return _fetch(*named)


def push(folder: Path, repo: str, private: bool = False, license_id: str | None = None) -> str:
    """Put an exported folder into a repository, made if it is not there; returns its address.

    The card gets the repository's name into its commands, and ``license_id`` where it names no licence.

    Raises:
        HubError: ``folder`` holds no policy, one that only works on this machine or is under no licence, or the Hub
            does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from apt.hub_folder import CARD_FILE, CONFIG_FILE, FILES, is_exported, read_folder_config

    named = _repository(repo)
    if named is None or named[1] is not None:
        raise HubError(f"{repo!r} is no repository's name; wanted org/name")
    if not is_exported(folder):
        raise HubError(f"{folder} is no exported checkpoint; make one: python -m apt.checkpoint export CKPT {folder}")
    vlm = str(read_folder_config(folder).get("vlm", ""))
    if Path(vlm).is_absolute() or Path(vlm).exists():
        raise HubError(
            f"{folder}: its VLM is {vlm}, a folder of this machine; put that on the Hub, and its name as 'vlm' into "
            f"{folder / CONFIG_FILE}"
        )
    card = _licensed(folder / CARD_FILE, license_id).replace(CARD_PLACE, repo)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    operations = [CommitOperationAdd(name, file) for name, file in (files | {CARD_FILE: card.encode("utf-8")}).items()]
    with _said_in_one_line(repo):
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="A policy of apt-vla")
    return str(address)


def _licensed(file: Path, license_id: str | None) -> str:
    """The card's text, with a licence in its metadata."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError) as error:
        raise HubError(f"{file} is no model card ({error}); export the checkpoint again") from error
    if card.data.license is None:
        if license_id is None:
            raise HubError(f"{file} names no licence, and nobody may use what has none; add --license, e.g. apache-2.0")
        card.data.license = license_id
    elif license_id not in (None, card.data.license):
        raise HubError(f"{file} says license: {card.data.license}; leave --license out, or change the card")
    return str(card)


def _repository(text: str) -> tuple[str, str | None] | None:
    """Name and revision, where a text can be these."""
    found = _REPOSITORY.fullmatch(text)
    return (found["repo"], found["revision"]) if found and not found["repo"].endswith(".pt") else None


@functools.lru_cache(maxsize=64)
def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    from apt.hub_folder import EXPERT_FILE, FILES, is_exported  # and torch, which --help need not wait for

    with _said_in_one_line(repo if revision is None else f"{repo}@{revision}"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    if not is_exported(folder):
        raise HubError(
            f"the Hub's {repo} holds no policy of this library ({EXPERT_FILE} is not in it); of other layouts, fetch "
            f"the files (hf download {repo}) and give the .pt"
        )
    return folder


@contextlib.contextmanager
def _said_in_one_line(repo: str) -> Iterator[None]:
    """What the Hub's client raises, as :class:`HubError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:  # a kind of the next one
        raise HubError(
            f"{repo} is gated: ask for access on its page of the Hub, then log in here (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no {repo} here (no file, folder or run of that name) nor on the Hub; if it is private, log in "
            "(hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo}: the Hub has the repository and no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"there is no {repo} here (no file, folder or run of that name, nor in the Hub's cache), and the Hub "
            "cannot be reached"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(
                f"the Hub refuses {repo} ({status}): log in with a token that may (hf auth login)"
            ) from error
        raise HubError(f"the Hub refuses {repo}: {one_line(error)}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise HubError(f"{repo}: the Hub cannot be reached ({one_line(error)})") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo} is no repository's name: {one_line(error)}") from error
