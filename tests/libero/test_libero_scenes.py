"""Labelled pictures of LIBERO's scenes: what things are called, where they are put, and that the labels are right."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from apt.grounding.scenes import SceneSet, parts_of
from examples.libero.environment import ROOT
from examples.libero.scenes import SENTENCES, Naming
from tests.libero.test_libero_expert import needs_simulator
from tests.libero.test_libero_language import make_tasks


def test_things_are_called_as_the_instructions_call_them(tmp_path):
    things = "akita_black_bowl_1 - akita_black_bowl plate_1 - plate basket_1 - basket wine_rack_1 - wine_rack"
    tasks = make_tasks(
        tmp_path,
        put_the_black_bowl_on_the_plate=(things, "(On akita_black_bowl_1 plate_1)"),
        put_the_plate_in_the_basket=(things, "(In plate_1 basket_1_inside)"),
    )
    naming = Naming.of(tasks)
    assert naming.names["akita_black_bowl"] == "black bowl" and naming.names["wine_rack"] == "wine rack"
    assert naming.containers == {"plate", "basket"}


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
def test_labels_lie_on_what_they_name_and_things_lie_anywhere(tmp_path):
    flags = ["--scenes", "1", "--workers", "1", "--image_size", "96", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "examples.libero.scenes", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scenes = SceneSet(parts_of(tmp_path))
    assert scenes.description.cameras == ("agentview", "eye_in_hand") and scenes.description.sentences == SENTENCES
    assert {"alphabet soup", "milk", "basket"} <= set(scenes.names()) and len(scenes.names()) == 11
    for things in scenes.things:
        assert [thing.kind for thing in things].count("container") == 1 and things[-1].name == "basket"

    seen = [
        (number, thing.places[0])
        for number, things in enumerate(scenes.things)
        for thing in things
        if thing.name == "milk" and thing.places[0] is not None
    ]
    assert len(seen) > 50 and (np.ptp([place for _, place in seen], axis=0) > 0.25).all()
    redness = []  # milk cartons are red, the floor is not
    for number, (u, v) in seen:
        image, x, y = scenes.image(number, 0).astype(float), int(96 * u), int(96 * v)
        red = image[..., 0] - image[..., 1:].mean(axis=-1)
        redness.append(red[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].max() - np.median(red))
    assert np.median(redness) > 30
