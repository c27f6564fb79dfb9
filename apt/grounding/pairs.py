"""Writes image-text pairs about rendered scenes, for a policy's training to keep its VLM pointing.

    python -m apt.grounding.pairs --scenes data/blocks_scenes --out data/blocks_pairs

Demonstrations show few things and name them in few ways; a VLM that is tuned on them alone forgets how to tell others
apart. Each pair asks of one picture where something is that it shows, by itself or in an instruction, and the answer is
the words for its place (``apt.grounding.places``). ``--image_text_pairs`` takes the file
(docs/training.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from apt.grounding.dialogues import pieces
from apt.grounding.places import where_words
from apt.grounding.scenes import SceneSet, Thing, parts_of
from data_utils.cli import bar, check_writable, parse
from data_utils.files import write_text

PAIRS_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class PairsConfig:
    scenes: Path
    """Folder of rendered parts; the first is for judging alone and left out."""
    out: Path
    """Folder for the pictures and the pairs."""
    bins: int = 48
    """Places along each side of an image, as the VLM has words for."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"--bins is {self.bins}; it must be at least 1")


def write_pairs(config: PairsConfig) -> Path:
    """Two pairs per picture where it shows enough; the JSONL file appears when all pictures are there.

    Raises:
        DataError: see :class:`apt.grounding.scenes.SceneSet`.
        OSError: a picture cannot be written.
    """
    scenes, rng = SceneSet(parts_of(config.scenes)[1:]), np.random.default_rng(config.seed)
    sentences = [pieces(sentence) for sentence in scenes.description.sentences]
    (config.out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for scene in bar(range(len(scenes)), unit="scene"):
        for camera, name in enumerate(scenes.description.cameras):
            shown = [thing for thing in scenes.things[scene] if thing.places[camera] is not None]
            asked = list(_questions(rng, sentences, shown, camera, config.bins))
            if not asked:
                continue
            image = f"images/{scene:05d}_{name}.png"
            if not cv2.imwrite(str(config.out / image), scenes.image(scene, camera)[..., ::-1]):
                raise OSError(f"{config.out / image} cannot be written; is the disk full?")
            lines += [json.dumps({"image": image, "prompt": prompt, "answer": answer}) for prompt, answer in asked]
    file = config.out / PAIRS_FILE
    write_text(file, "\n".join(lines) + "\n")
    return file


def _questions(
    rng: np.random.Generator, sentences: list, shown: list[Thing], camera: int, bins: int
) -> Iterator[tuple[str, str]]:
    """Prompts and answers: where one thing is, and an instruction whose things are all shown."""
    if not shown:
        return
    thing = shown[int(rng.integers(len(shown)))]
    yield f"where is the {thing.name}", where_words(thing.places[camera], bins)
    prompt, places = "", ""
    for literal, kind in sentences[int(rng.integers(len(sentences)))]:
        prompt += literal
        if kind is not None:
            fitting = [thing for thing in shown if thing.kind == kind]
            if not fitting:
                return
            thing = fitting[int(rng.integers(len(fitting)))]
            prompt, places = f"{prompt} {thing.name}", places + where_words(thing.places[camera], bins)
    yield prompt, places


def main(argv: list[str]) -> int:
    try:
        config = parse(PairsConfig, argv, "python -m apt.grounding.pairs", "Write image-text pairs about scenes.")
        check_writable(config.out, "--out")
        file = write_pairs(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{file}, which --image_text_pairs takes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
