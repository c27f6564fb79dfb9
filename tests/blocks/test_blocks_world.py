"""What the world of blocks draws, without a simulator."""

import dataclasses

import numpy as np
import pytest
import yaml

from examples.blocks.world import WORLD_FILE, Block, load_world


@pytest.fixture(scope="module")
def world():
    return load_world()


def draws(world, split, count=300):
    rng = np.random.default_rng(0)
    return [world.draw(rng, world.split(split)) for _ in range(count)]


def test_every_word_of_an_unseen_block_is_seen_with_others(world):
    seen, unseen = set(world.seen_blocks), set(world.unseen_blocks)
    assert len(seen) + len(unseen) == len(world.colors) * len(world.shapes) and not seen & unseen
    assert {block.color for block in unseen} <= {block.color for block in seen}
    assert {block.shape for block in unseen} <= {block.shape for block in seen}


def test_demonstrations_show_no_unseen_block_tray_or_wording(world):
    for layout in draws(world, "SO"):
        assert set(layout.blocks) <= set(world.seen_blocks)
        assert set(layout.trays.values()) <= set(world.seen_trays)
        assert not any(text.startswith(("place", "take")) for text in layout.instructions)


@pytest.mark.parametrize(("split", "part"), [("UO", "object"), ("UC", "container"), ("UI", "instruction")])
def test_a_split_changes_what_it_says_and_nothing_else(world, split, part):
    assert dataclasses.asdict(world.split(split)) == {
        name: name == part for name in ("object", "container", "environment", "instruction")
    }
    for layout in draws(world, split):
        assert (layout.blocks[0] in world.unseen_blocks) == (part == "object")
        assert (layout.trays[layout.target] in world.unseen_trays) == (part == "container")
        assert layout.instructions[0].startswith("place") == (part == "instruction")
        assert set(layout.blocks[1:]) <= set(world.seen_blocks)


def test_the_instruction_is_needed_every_block_and_tray_is_named_equally_often(world):
    layouts = draws(world, "SO", 3000)
    named = [layout.blocks[0] for layout in layouts]
    counts = np.array([named.count(block) for block in world.seen_blocks])
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()
    assert 0.45 < np.mean([layout.target == "near" for layout in layouts]) < 0.55
    assert all(len(set(layout.trays.values())) == len(layout.trays) for layout in layouts)


def test_blocks_of_the_named_colour_and_of_the_named_shape_lie_beside_it_in_many_episodes(world):
    alike = [
        sum(getattr(block, part) == getattr(layout.blocks[0], part) for block in layout.blocks[1:]) > 0
        for layout in draws(world, "SO", 1000)
        for part in ("color", "shape")
    ]
    assert np.mean(alike) > world.confusable


def test_the_same_seed_draws_the_same_episode(world):
    first, again = (world.draw(np.random.default_rng([3, 1]), world.split("UO")) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": {"cone": ["red"]}}, r"seen\.cone: is not among shapes cube, cylinder, bar"),
        ({"seen_trays": ["pink", "red"]}, "seen_trays: pink is not among colors"),
        ({"blocks": [3, 9]}, r"blocks: \[3, 9\]; wanted the least and the most"),
        ({"splits": {"SO": {"robot": True}}}, r"splits\.SO: has unknown field 'robot'; known: object"),
        ({"confusable": "often"}, "confusable: is 'often'; wanted a finite number"),
    ],
)
def test_a_wrong_world_file_is_refused_by_file_and_key(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(WORLD_FILE.read_text()), **change}, sort_keys=False))
    with pytest.raises(ValueError, match=message) as error:
        load_world(path)
    assert str(path) in str(error.value)


def test_an_unknown_split_lists_the_known_ones(world):
    with pytest.raises(ValueError, match="no split 'XX'; it has SO, UO, UC, UE, UOUE, UI"):
        world.split("XX")


def test_a_block_is_called_by_colour_and_shape():
    assert str(Block("red", "cube")) == "red cube"


def test_an_instruction_is_read_for_what_it_names_whatever_its_wording(world):
    for text in ("put the red cube in the blue tray", "Drop it: RED cube, blue tray!", "blue tray <- the red cube"):
        request = world.request(text)
        assert str(request.block) == "red cube" and request.tray == "blue"
    for text in ("put the red cube", "put the red cube and the blue bar in the white tray", "put the cube in the tray"):
        with pytest.raises(ValueError, match="does not name one block and one tray; wanted for example"):
            world.request(text)


def test_a_requested_layout_has_the_block_and_the_tray_that_are_named(world):
    for seed in range(20):
        request = world.request("put the white cube in the orange tray")  # a pair and a tray that demonstrations lack
        layout = world.draw(np.random.default_rng(seed), world.split("SO"), request)
        assert str(layout.blocks[0]) == "white cube" and layout.trays[layout.target] == "orange"
        assert len(set(layout.trays.values())) == len(layout.trays)


def test_a_world_file_may_be_like_another(tmp_path):
    corner = load_world(WORLD_FILE.with_name("corner.yaml"))
    assert corner.colors == load_world().colors and corner.goal is not None
    layout = corner.draw(np.random.default_rng(0), corner.split("SO"))
    assert layout.target == "goal" and layout.instructions == (f"put the {layout.blocks[0]} in the corner",)
    (tmp_path / "mine.yaml").write_text("like: theirs.yaml\nname: mine\n")
    with pytest.raises(ValueError, match="mine.yaml, line 1: like: there is no .*theirs.yaml"):
        load_world(tmp_path / "mine.yaml")
