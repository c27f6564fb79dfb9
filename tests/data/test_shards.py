"""Parts of some work: which episode belongs to which, and what is said of parts that there are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_utils.cli import CommandLineError
from data_utils.shards import Shard


@given(st.integers(1, 20), st.integers(0, 1000))
def test_every_episode_belongs_to_exactly_one_part(count, number):
    assert sum(Shard(index, count).owns(number) for index in range(count)) == 1


def test_a_part_is_written_as_one_of_so_many_from_0():
    assert Shard.parse("2/8") == Shard(2, 8) and Shard.parse(None) is None
    assert Shard(2, 8).suffix == ".2_of_8"


@pytest.mark.parametrize("text", ["8/8", "1/0", "-1/4", "1", "a/b", "1/4/2", ""])
def test_parts_that_there_are_not_are_refused(text):
    with pytest.raises(CommandLineError, match="^--shard is "):
        Shard.parse(text)
