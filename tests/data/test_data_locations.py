"""Where data is: the location file, its host blocks and its errors."""

import pytest

from data_utils import data_loc
from data_utils.data_loc import Location, get_ipv4_address, locate
from data_utils.datasets import PickPlaceCan
from data_utils.errors import DataError
from data_utils.index.episode_list import list_episodes
from tests.data.episodes import write_episode


@pytest.fixture
def location(tmp_path, monkeypatch):
    """Write the YAML text and make it count."""

    def write(text, host="10.1.2.3"):
        path = tmp_path / "loc.yaml"
        path.write_text(text)
        monkeypatch.setenv("APT_DATA_LOC", str(path))
        monkeypatch.setenv("APT_DATA_LOC_HOST", host)
        return path

    for name in ("a/1.h5", "a/sub/2.hdf5", "b/3.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_episode(tmp_path / name, frames=2)
    for name in ("b/.4.h5", "b/.5.h5.77.tmp", "b/notes.txt"):
        (tmp_path / name).touch()
    return write


def names(found):
    return [path.rsplit("/", 1)[1] for path in list_episodes(found, ())]


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("a", ["1.h5", "2.hdf5"]),
        ("b/3.h5", ["3.h5"]),
        ("'*/*'", ["1.h5", "3.h5"]),
        ("'**/*.hdf5'", ["2.hdf5"]),
        ("[a/1.h5, b]", ["1.h5", "3.h5"]),
    ],
)
def test_a_location_is_a_folder_file_glob_or_list(location, entry, wanted):
    location(f"default:\n  Droid: {entry}\n")
    assert names(locate("Droid")) == wanted


def test_the_closest_host_block_wins_and_default_fills_in(location):
    text = "default: {A: a, B: a, C: a}\n'10.1.': {A: a/1.h5, B: a/1.h5}\n'10.1.2.3': {A: b}\n'10.1.2.33': {C: b}\n"
    location(text)
    assert [names(locate(name)) for name in "ABC"] == [["3.h5"], ["1.h5"], ["1.h5", "2.hdf5"]]
    location(text, host="10.1.9.9")
    assert names(locate("A")) == ["1.h5"]
    location(text, host="192.168.0.1")
    assert names(locate("A")) == ["1.h5", "2.hdf5"]


def test_an_entry_may_say_where_its_videos_are(location, tmp_path):
    location("default:\n  A: [{path: a, video_root: videos}, b]\n")
    assert locate("A") == [Location(f"{tmp_path}/a", f"{tmp_path}/videos"), Location(f"{tmp_path}/b")]
    episodes = list_episodes(locate("A"), ())
    assert [episodes.video_root(i) for i in range(3)] == [f"{tmp_path}/videos"] * 2 + [None]


def test_a_missing_entry_says_which_name_which_file_and_what_to_add(location):
    path = location("default:\n  Other: a\n")
    with pytest.raises(DataError) as caught:
        PickPlaceCan()
    message = str(caught.value)
    assert "PickPlaceCan" in message and str(path) in message and "default:" in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("default:\n  X: nowhere\n", "nowhere.*matches no episode files"),
        ("default:\n  X: 3\n", "entry X is 3"),
        ("default:\n  X: []\n", "entry X"),
        ("default:\n  X: {video_root: a}\n", "entry X.*mapping with 'path'"),
        ("default:\n  X: {path: a, videos: a}\n", "entry X.*mapping with 'path'"),
        ("- a\n", "holds a list"),
        ("default: a\n", "block 'default' is not a mapping"),
        ("default: [unclosed\n", "not valid YAML"),
    ],
)
def test_a_wrong_location_file_is_one_clear_line(location, text, match):
    location(text)
    with pytest.raises(DataError, match=match) as caught:
        locate("X")
    assert "\n" not in str(caught.value)


def test_a_named_location_file_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("APT_DATA_LOC", str(tmp_path / "none.yaml"))
    with pytest.raises(DataError, match="APT_DATA_LOC names .*none.yaml"):
        locate("Droid")


def test_the_local_file_comes_before_the_checked_in_one(monkeypatch, tmp_path):
    monkeypatch.delenv("APT_DATA_LOC", raising=False)
    assert data_loc.location_file().name in ("data_loc.yaml", "data_loc.local.yaml")
    monkeypatch.setattr(data_loc, "__file__", str(tmp_path / "data_loc.py"))
    (tmp_path / "data_loc.yaml").write_text("default: {}\n")
    assert data_loc.location_file() == tmp_path / "data_loc.yaml"
    with pytest.raises(DataError, match=f"in {tmp_path}/data_loc.local.yaml, which then counts instead"):
        locate("Droid")
    (tmp_path / "data_loc.local.yaml").write_text("default: {}\n")
    assert data_loc.location_file() == tmp_path / "data_loc.local.yaml"


def test_the_host_can_be_named_and_is_otherwise_an_address(monkeypatch):
    monkeypatch.setenv("APT_DATA_LOC_HOST", "my-node")
    assert get_ipv4_address() == "my-node"
    monkeypatch.delenv("APT_DATA_LOC_HOST")
    assert len(get_ipv4_address().split(".")) == 4


def test_a_dataset_opens_from_its_location(location, tmp_path):
    (tmp_path / "can").mkdir()
    write_episode(tmp_path / "can" / "0.h5", frames=3, cameras=("e2h_cam", "eih_cam"))
    location("default:\n  PickPlaceCan: can\n")
    dataset = PickPlaceCan()
    assert len(dataset) == 1 and dataset[0]["obs_rgbs"].shape == (1, 2, 3, 256, 256)
