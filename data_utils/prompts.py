"""What an instruction may be: the same in files, conversion, training and serving."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MAX_CHARACTERS = 4000
"""Of an instruction, some 1,000 tokens: a page of text."""

_REFUSED = ("Cc", "Cs")  # control characters, halves of surrogate pairs
_MISSING = ("None", "nan", "NaN", "null", "<NA>")  # what a value that is not there is written as


def check_prompt(text: object) -> None:
    """Raises ``ValueError`` that says what is wrong with an instruction, to stand behind its name."""
    if not isinstance(text, str):
        raise ValueError(f"is {text!r:.80}, a {type(text).__name__}; wanted a text, such as 'open the door'")
    if not text.strip():
        raise ValueError(f"is empty ({text!r:.80}); wanted a text, such as 'open the door'")
    if text.strip() in _MISSING:
        raise ValueError(f"is {text!r}, as a missing one is written; wanted a text, such as 'open the door'")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has {len(text)} characters ({text!r:.40}...); wanted at most {MAX_CHARACTERS}")
    for place, character in enumerate(text):
        if unicodedata.category(character) in _REFUSED and not character.isspace():
            what = f"has the character U+{ord(character):04X} at {place}"
            raise ValueError(f"{what}, which is no text ({text[:place][-40:]!r})")


def check_prompts(texts: Sequence[object]) -> None:
    """Of an episode, as :func:`check_prompt` of each; there must be one."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"are {texts!r:.80}, a {type(texts).__name__}; wanted a list of texts")
    if not texts:
        raise ValueError("are none; wanted at least one text")
    for number, text in enumerate(texts):
        try:
            check_prompt(text)
        except ValueError as error:
            raise ValueError(f"number {number} {error}") from error


def one_spaced(text: str) -> str:
    """As a policy reads it: every run of white space, line separators among it, is one space; none at the ends."""
    return " ".join(text.split())
