"""What is asked about a scene, as tokens: where is the red cube, what is at this place, put this in that.

Several questions about the same pictures follow each other in one sequence. At the last token of every name a head also
learns to point to what is named, before any word is spoken.
"""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass, field

import numpy as np

from apt.grounding.places import where_words
from apt.grounding.scenes import Place, SceneSet, Thing

QUESTIONS = 4  # in a sequence; pictures cost more than words, so that one more costs little
SHARES = {"instruction": 0.5, "where": 0.2, "what": 0.2, "list": 0.1}
NOT_THERE = " none"


@dataclass
class Dialogue:
    """One sequence."""

    scene: int
    cameras: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    mentions: list[tuple[int, Thing]] = field(default_factory=list)
    """(place of a name's last token, what is named)"""


class DialogueSampler:
    """Draws dialogues.

    Args:
        tokenizer: of :func:`apt.grounding.architecture.make_tokenizer`.
        tokens_per_image: placeholders of an image.
        bins: places along each side.
    """

    def __init__(self, scenes: SceneSet, tokenizer, tokens_per_image: int, bins: int) -> None:
        self._scenes, self._bins = scenes, bins
        self._encode = functools.cache(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._image = [
            *self._encode("<|vision_start|>"),
            *([image] * tokens_per_image),
            *self._encode("<|vision_end|>"),
        ]
        self._sentences = [pieces(sentence) for sentence in scenes.description.sentences]

    def draw(self, rng: np.random.Generator, scene: int, cameras: tuple[int, ...]) -> Dialogue:
        """A dialogue about the pictures of ``cameras``."""
        made = self._opened(scene, cameras)
        things = self._scenes.things[scene]
        seen = [thing for thing in things if any(thing.places[camera] is not None for camera in cameras)]
        for question in range(QUESTIONS):
            if question > 0:
                self._say(made, "\n<|im_start|>user\n")
            kind = rng.choice(list(SHARES), p=list(SHARES.values()))
            asked = getattr(self, f"_ask_{kind}")(made, rng, things, seen or things)
            self._say(made, "<|im_end|>\n<|im_start|>assistant\n")
            for answer in asked:
                self._add(made, answer, is_answer=True)
            self._say(made, "<|im_end|>", is_answer=True)
        return made

    def instruct(self, rng: np.random.Generator, scene: int, cameras: tuple[int, ...]) -> Dialogue:
        """An instruction about the pictures of ``cameras``, as a policy gets it: nothing has been answered yet."""
        made = self._opened(scene, cameras)
        self._ask_instruction(made, rng, self._scenes.things[scene], None)
        self._say(made, "<|im_end|>\n<|im_start|>assistant\n")
        return made

    def _opened(self, scene: int, cameras: tuple[int, ...]) -> Dialogue:
        """The pictures, and nothing said of them yet."""
        made = Dialogue(scene, cameras)
        self._say(made, "<|im_start|>user\n")
        for _ in cameras:
            self._add(made, self._image)
        return made

    def _ask_instruction(self, made: Dialogue, rng: np.random.Generator, things: list[Thing], _seen) -> list:
        named = []
        for literal, kind in self._sentences[int(rng.integers(len(self._sentences)))]:
            self._say(made, literal)
            if kind is not None:
                fitting = [thing for thing in things if thing.kind == kind]
                named.append(fitting[int(rng.integers(len(fitting)))])
                self._mention(made, named[-1])
        return [self._where(thing, made.cameras) for thing in named]

    def _ask_where(self, made: Dialogue, rng: np.random.Generator, things: list[Thing], _seen) -> list:
        thing = things[int(rng.integers(len(things)))]
        self._say(made, "where is the")
        self._mention(made, thing)
        return [self._where(thing, made.cameras)]

    def _ask_what(self, made: Dialogue, rng: np.random.Generator, _things, seen: list[Thing]) -> list:
        thing = seen[int(rng.integers(len(seen)))]
        self._say(made, "what is at")
        self._add(made, self._where(thing, made.cameras))
        return [self._encode(f" {thing.name}")]

    def _ask_list(self, made: Dialogue, _rng, things: list[Thing], _seen) -> list:
        """Objects of the first picture, from left to right."""
        self._say(made, "what is there")
        camera = made.cameras[0]
        there = [thing for thing in things if thing.places[camera] is not None]
        there.sort(key=lambda thing: thing.places[camera][0])
        return [self._encode(f" {thing.name}") for thing in there] or [self._encode(NOT_THERE)]

    def _where(self, thing: Thing, cameras: tuple[int, ...]) -> list[int]:
        return [token for camera in cameras for token in self._place(thing.places[camera])]

    def _place(self, place: Place) -> tuple[int, ...]:
        return self._encode(NOT_THERE if place is None else where_words(place, self._bins))

    def _mention(self, made: Dialogue, thing: Thing) -> None:
        self._add(made, self._encode(f" {thing.name}"))
        made.mentions.append((len(made.ids) - 1, thing))

    def _say(self, made: Dialogue, text: str, is_answer: bool = False) -> None:
        self._add(made, self._encode(text), is_answer)

    @staticmethod
    def _add(made: Dialogue, tokens, is_answer: bool = False) -> None:
        made.ids += tokens
        made.is_answer += [is_answer] * len(tokens)


def pieces(sentence: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the kind that is named behind it; names bring their own leading space."""
    return [(literal.rstrip(), kind) for literal, kind, _, _ in string.Formatter().parse(sentence)]
