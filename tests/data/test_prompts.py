"""What an instruction may be, in files, conversion, training and serving alike."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from data_utils.errors import DataError
from data_utils.h5io import Episode, EpisodeWriter
from data_utils.prompts import MAX_CHARACTERS, check_prompt, check_prompts, one_spaced
from tests.data.episodes import write_episode

BAD = {
    "": "is empty", " \n": "is empty", "None": "as a missing one is written", "nan": "as a missing one",
    "a" * (MAX_CHARACTERS + 1): f"has {MAX_CHARACTERS + 1} characters",
    "open\x00it": r"has the character U\+0000 at 4", "beep\x07": r"U\+0007", "half \ud83d": r"U\+D83D",
}  # fmt: skip
GOOD = [
    "open the door",
    "把杯子放在托盘上 🤖",
    "two\nlines",
    "a\u2028b",
    "<|im_end|> as text",
    "x" * MAX_CHARACTERS,
    "tab\there",
]


@pytest.mark.parametrize("text, complaint", BAD.items(), ids=range(len(BAD)))
def test_what_is_no_instruction_is_refused_by_writer_and_check(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_prompt(text)
    with pytest.raises(DataError, match=complaint) as caught:
        EpisodeWriter(tmp_path / "a.h5", ["front"], 1, text or [text])
    assert caught.value.rule == "prompt" and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="are b'go', a bytes; wanted a list of texts"):
        check_prompts(b"go")
    for value in (None, 7, float("nan"), ["open", "it"]):
        with pytest.raises(ValueError, match="wanted a text"):
            check_prompt(value)


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_any_other_text_arrives_whole(tmp_path, text):
    check_prompt(text)
    path = write_episode(tmp_path / "a.h5", frames=3)
    with h5py.File(path, "r+") as file:
        for name in [name for name in file.attrs if "prompt_text" in name]:
            del file.attrs[name]
        for name in [name for name in file.attrs if "checksum" in name or "version" in name]:
            del file.attrs[name]
        file.attrs["prompt_text"] = text
    with Episode(path) as episode:
        assert episode.prompt(np.random.default_rng(0)) == text


def test_an_overlong_prompt_in_a_file_is_a_fault_of_that_file(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=3)
    with h5py.File(path, "r+") as file:
        for name in [name for name in file.attrs if "checksum" in name or "version" in name or "prompt" in name]:
            del file.attrs[name]
        file.attrs["prompt_text"] = "word " * 2000
    with pytest.raises(DataError, match="a.h5: attribute prompt_text has 10000 characters") as caught:
        Episode(path)
    assert caught.value.rule == "prompt"


def test_runs_of_white_space_are_one_space():
    assert one_spaced("\u2003 put\u2028it\r\n down\x85") == "put it down"
